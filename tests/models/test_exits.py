import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.api import ExitSchedule, Gear, UserError, planned_layer_evals
from models.backbones.dit import DiT, DiTConfig
from models.exits.optimise import equal_edges, greedy, optimise, to_schedule, uniform_times, visits
from models.exits.plan import ScheduleMismatch, check, make, plan
from models.registry import EXITS

REPO = Path(__file__).parents[2]
SCHEDULE = ExitSchedule((0.25, 0.5, 1.0), (8, 6, 4))


def small() -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(image_size=8, patch=4, width=32, depth=4, heads=2, classes=3, time_features=16)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(("u", "depth"), [(0.0, 8), (0.2499, 8), (0.25, 6), (0.4999, 6), (0.5, 4), (1.0, 4)])
def test_bins_are_half_open_and_the_last_includes_one(u, depth):
    assert SCHEDULE.depth(u) == depth


@pytest.mark.parametrize(
    ("edges", "depths"),
    [((), ()), ((0.5,), (3,)), ((0.5, 0.4, 1.0), (1, 2, 3)), ((0.0, 1.0), (1, 2)), ((1.0,), (0,)), ((1.0,), (1, 2))],
)
def test_malformed_schedules_are_refused(edges, depths):
    with pytest.raises(ValueError, match="exit"):
        ExitSchedule(edges, depths)


def test_plan_follows_original_times():
    assert plan(SCHEDULE, [1.0, 0.75, 0.5, 0.25, 0.0]) == [4, 4, 4, 6, 8]


def test_a_schedule_for_other_weights_is_refused():
    gear = Gear("eco", ExitSchedule((1.0,), (3,), weights="a" * 64), "ddim", 10, 1.0)
    check(gear, "a" * 64, 8)
    with pytest.raises(ScheduleMismatch, match="eco"):
        check(gear, "b" * 64, 8)
    check(gear, "b" * 64, 8, force=True)
    with pytest.raises(ScheduleMismatch, match="3 blocks of 2"):
        check(gear, "a" * 64, 2, force=True)
    with pytest.raises(ScheduleMismatch, match="always runs 4"):
        check(gear, "a" * 64, 8, shallowest=4)


def test_price_counts_guided_rows_twice():
    gear = Gear("g", SCHEDULE, "ddim", 4, 1.0)
    assert planned_layer_evals(gear, 4, 1.0, 1) == 4 + 4 + 4 + 6
    assert planned_layer_evals(gear, 4, 2.0, 3) == 2 * 3 * 18


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9))
@torch.no_grad()
def test_a_batch_of_depths_equals_each_row_alone(depths):
    model = small()
    depths = sorted(depths, reverse=True)
    n = len(depths)
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    modulation = model.condition(torch.linspace(0, 1, 9)[:n], torch.arange(n) % 4)
    together, ran = model(x, modulation, depths)
    assert ran == [sum(d > level for d in depths) for level in range(depths[0])]
    for i, depth in enumerate(depths):
        alone, _ = model(x[i : i + 1], modulation[i : i + 1], [depth])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_depth_changes_the_answer():
    model = small()
    x, modulation = torch.randn(1, 1, 8, 8), model.condition(torch.tensor([0.5]), torch.tensor([0]))
    assert not torch.allclose(model(x, modulation, [2])[0], model(x, modulation, [4])[0])


EXAMPLES = [
    {"exit": "full"},
    {"exit": "ase", "name": "demo"},
    {"exit": "ase", "name": "d3"},
    {"exit": "ase", "name": "d5"},
    {"exit": "ase", "drop": 4.5},
    {"exit": "table", "edges": [0.3, 1.0], "depths": [3, 2]},
]


def test_every_kind_has_an_example():
    assert {example["exit"] for example in EXAMPLES} == set(EXITS)


def keeps_the_contract(spec, depth):
    """Bins cover [0, 1], depths are exits of the network, and JSON gives the same schedule back."""
    made = make(spec, depth)
    assert made.edges[-1] == 1.0
    assert {made.depth(u / 100) for u in range(101)} <= set(range(1, depth + 1))
    table = json.loads(json.dumps({"edges": made.edges, "depths": made.depths, "weights": "w"}))
    assert make(table, None) == dataclasses.replace(made, weights="w")
    check(Gear("g", make({**spec, "weights": "w"}, depth), "ddim", 10, 1.0), "w", depth)


@pytest.mark.parametrize("depth", [3, 8, 12, 28])
@pytest.mark.parametrize("spec", EXAMPLES, ids=str)
def test_every_kind_keeps_the_contract(spec, depth):
    keeps_the_contract(spec, depth)


def test_the_published_list_and_its_fractions():
    """Moon et al.'s code: 28 blocks down to 12; 12 blocks by the same fractions."""
    assert make({"exit": "ase", "name": "demo"}, 28).depths == (28, 28, 24, 24, 20, 20, 16, 16, 12, 12)
    assert make({"exit": "ase", "name": "demo"}, 12).depths == (12, 12, 10, 10, 9, 9, 7, 7, 5, 5)
    assert make({"exit": "ase", "name": "d5"}, 28).depths == (28, 28, 23, 23, 18, 18, 13, 13, 8, 8)
    assert sum(make({"exit": "ase", "drop": 3}, 28).depths) == 220


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"exit": "none"}, "known: ase, full, table"),
        ({"exit": "ase"}, "either drop or name"),
        ({"exit": "ase", "drop": 7}, r"drop must be in \[0, 7\)"),
        ({"exit": "ase", "name": "p1"}, "known: demo, d3, d5"),
        ({"exit": "ase", "dorp": 4}, "dorp"),
        ({"edges": [1.0], "depths": [9]}, "9 blocks of 8"),
        ({"edges": [0.5], "depths": [4]}, "exactly 1.0"),
        ({"edges": [1.0]}, "depths"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(spec, says):
    with pytest.raises(UserError, match=says):
        make(spec, 8)


def test_the_page_on_adding_an_exit_works(tmp_path, monkeypatch):
    """docs/add-an-exit.md, followed: its file, its registry line, its JSON."""
    page = (REPO / "docs" / "add-an-exit.md").read_text()
    code, spec = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "json"))
    name, target = re.search(r'^    "(\w+)": "models\.exits\.(\w+:schedule)",$', page, re.MULTILINE).groups()
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXITS, name, target)
    keeps_the_contract(json.loads(spec), 8)
    assert make(json.loads(spec), 8) == ExitSchedule((0.4, 1.0), (8, 4))
    with pytest.raises(UserError, match=r"shallow must be in 1\.\.8"):
        make({**json.loads(spec), "shallow": 9}, 8)


def brute_force(costs, depths, evaluations, budget, falling):
    bins = costs.shape[1]
    best = np.inf
    for levels in itertools.product(range(len(depths)), repeat=bins):
        spent = sum(depths[i] * n for i, n in zip(levels, evaluations, strict=True))
        if spent <= budget and (not falling or list(levels) == sorted(levels, reverse=True)):
            best = min(best, sum(costs[i, b] for b, i in enumerate(levels)))
    return best


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.floats(0, 1))
def test_dynamic_programming_finds_the_best_schedule_there_is(seed, exits, bins, falling, tightness):
    rng = np.random.default_rng(seed)
    costs, depths = rng.random((exits, bins)), list(range(2, 2 + exits))
    evaluations = rng.integers(0, 4, bins).tolist()
    least, most = depths[0] * sum(evaluations), depths[-1] * sum(evaluations)
    budget = round(least + tightness * (most - least))
    found = optimise(costs, depths, evaluations, budget, falling)
    assert sum(d * n for d, n in zip(found, evaluations, strict=True)) <= budget
    total = sum(costs[depths.index(d), b] for b, d in enumerate(found))
    assert total == pytest.approx(brute_force(costs, depths, evaluations, budget, falling))
    assert not falling or found == sorted(found, reverse=True)


def test_a_budget_below_the_shallowest_exit_is_refused():
    for search in (optimise, greedy):
        with pytest.raises(ValueError, match="shallowest exit 2"):
            search(np.ones((2, 3)), [2, 3], [1, 1, 1], 5)


def test_greed_is_within_budget_and_no_better():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.random((4, 6)), axis=0)[::-1]
    chosen = greedy(costs, [1, 2, 3, 4], [2] * 6, 30)
    exact = optimise(costs, [1, 2, 3, 4], [2] * 6, 30, falling=False)
    assert 2 * sum(chosen) <= 30
    price = [sum(costs[d - 1, b] for b, d in enumerate(s)) for s in (exact, chosen)]
    assert price[0] <= price[1]


def test_visits_count_the_evaluations_of_the_real_grid():
    """u = 1 - i / 20 falls in bins as schedules see it, edges and rounding included."""
    times = uniform_times(20)
    schedule = ExitSchedule(equal_edges(10), tuple(range(1, 11)))
    assert visits(times, 10) == [plan(schedule, times).count(b) for b in range(1, 11)]
    assert sum(visits(times, 10)) == 20


def test_to_schedule_joins_equal_neighbours():
    assert to_schedule([4, 4, 2, 2]) == ExitSchedule((0.5, 1.0), (4, 2))
    assert to_schedule([3, 3]) == ExitSchedule((1.0,), (3,))
