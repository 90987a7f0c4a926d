import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.api import ExitSchedule, Gear, planned_layer_evals
from models.backbones.dit import DiT, DiTConfig
from models.exits.plan import ScheduleMismatch, check, plan
from models.training.exits import allocate, to_schedule

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
    with pytest.raises(ScheduleMismatch, match="3 blocks of 2"):
        check(gear, "a" * 64, 2)


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


def test_allocate_spends_depth_where_it_pays():
    errors = np.array([[9.0, 1.1, 5.0], [8.0, 1.05, 2.0], [0.0, 1.0, 1.9]])
    assert allocate(errors, [1, 2, 3], 3.0) == [3, 3, 3]
    assert allocate(errors, [1, 2, 3], 2.0) == [3, 1, 2]
    with pytest.raises(ValueError, match="shallowest"):
        allocate(errors, [1, 2, 3], 0.5)


def test_to_schedule_joins_equal_neighbours():
    assert to_schedule([4, 4, 2, 2]) == ExitSchedule((0.5, 1.0), (4, 2))
    assert to_schedule([3, 3]) == ExitSchedule((1.0,), (3,))
