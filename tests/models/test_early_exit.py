"""Early exits of the classifier: routes and their costs, rows that leave, gates that learn what a forward is worth."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from models.backbones.early_exits import count, stages
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet, ResNetConfig
from models.evaluation import early_exit as ee
from models.evaluation.cli import app
from models.store import read_config, write_json
from models.training.heads import (
    Cache,
    Exits,
    HeadsRecipe,
    cache,
    confidence,
    exit_probabilities,
    train_heads,
    train_jointly,
)
from models.training.loop import Optim
from models.uncertainty.early_exit import Curve, choose_confidences, mixture, route
from tests.models.test_classify_task import make_zoo
from tests.models.test_evaluation import data  # noqa: F401

SHARES = st.floats(0.0, 1.0, width=32)
TINY = Optim(steps=300, batch=64, lr=2e-2, warmup=5, ema=0.9)
RECIPE = HeadsRecipe(optim=TINY, joint=TINY, grid=2, hidden=8)


@pytest.fixture(scope="module", params=[1, 2])
def network(request):
    torch.manual_seed(0)
    source = ResNet(ResNetConfig(classes=3, width=8, blocks=request.param)).eval().requires_grad_(False)
    return source, Exits(source.config, grid=2, hidden=8).requires_grad_(False)


def pixels(n):
    return torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def always(z):
    return torch.ones(len(z), dtype=torch.bool)


def expected_logits(source, exits, x):
    """Every exit's logits without leaving, and the source's own."""
    found, h = [], x
    for stage, head in zip(stages(source), exits.heads, strict=True):
        h = stage(h)
        found.append(head(exits.pool(h)))
    return [*found, source(x)]


@given(arrays(np.float32, (4, 2), elements=SHARES))
def test_exit_probabilities_are_a_distribution(gates):
    q = exit_probabilities(torch.from_numpy(gates))
    assert q.shape == (4, 3)
    assert bool((q >= 0).all())
    torch.testing.assert_close(q.sum(1), torch.ones(4))
    torch.testing.assert_close(q[:, 0], torch.from_numpy(gates[:, 0]))


@given(arrays(np.float64, (9, 2), elements=SHARES), SHARES, SHARES)
def test_a_route_leaves_at_the_first_exit_that_is_sure_enough(scores, first, second):
    left = route(scores, [first, second])
    for row, k in zip(scores, left, strict=True):
        sure = [row[0] >= first, row[1] >= second, True]
        assert sure.index(True) == k


@given(arrays(np.float64, (9, 2), elements=SHARES))
def test_extreme_thresholds_are_the_first_exit_and_the_whole_network(scores):
    assert (route(scores, [0.0, 0.0]) == 0).all()
    assert (route(scores, [np.inf, 0.0]) == 1).all()
    assert (route(scores, [np.inf, np.inf]) == 2).all()


def test_costs_are_the_counted_macs(network):
    source, exits = network
    macs = count(source, exits, pixels(1))
    whole = torch.nn.ModuleList([source, exits])
    single = count_macs(source, lambda: source(pixels(1)))
    assert macs.single == single
    assert macs.costs([False] * 3)[-1] == pytest.approx(1.0)
    for k in range(3):
        leave = [always if j == k else None for j in range(2)]
        counted = count_macs(whole, lambda leave=leave: ee.run(source, exits, leave, True, pixels(1)))
        assert macs.costs([j == k for j in range(3)])[k] == pytest.approx(counted / single)


def test_costs_count_every_head_that_runs_on_the_way(network):
    source, exits = network
    macs = count(source, exits, pixels(1))
    whole = torch.nn.ModuleList([source, exits])

    def never(z):
        return torch.zeros(len(z), dtype=torch.bool)

    counted = count_macs(whole, lambda: ee.run(source, exits, [never, never], False, pixels(1)))
    assert macs.costs([True, True, False])[-1] == pytest.approx(counted / macs.single)
    assert macs.costs([True, True, False], 0.19)[-1] == pytest.approx(counted / macs.single + 0.19)


def test_rows_that_leave_get_the_answer_of_their_exit(network):
    source, exits = network
    x = pixels(12)
    every = expected_logits(source, exits, x)
    cuts = [float(z.softmax(-1).amax(-1).median()) for z in every[:2]]
    leave = [ee.surer_than(cut, 1.0) for cut in cuts]
    logits, left = ee.run(source, exits, leave, False, x)
    scores = np.stack([z.softmax(-1).amax(-1).double().numpy() for z in every[:2]], 1)
    assert left.tolist() == route(scores, cuts).tolist()
    assert len(set(left.tolist())) == 3
    for row, k in enumerate(left.tolist()):
        torch.testing.assert_close(logits[row], every[3 if k == 2 else k][row], rtol=1e-4, atol=1e-5)


def test_without_exits_it_is_the_source(network):
    source, exits = network
    logits, left = ee.run(source, exits, [ee.surer_than(np.inf, 1.0)] * 2, False, pixels(5))
    torch.testing.assert_close(logits, source(pixels(5)), rtol=1e-4, atol=1e-5)
    assert left.tolist() == [2] * 5
    refit, _ = ee.run(source, exits, [None, None], True, pixels(5))
    torch.testing.assert_close(refit, expected_logits(source, exits, pixels(5))[2], rtol=1e-4, atol=1e-5)


def test_a_mixture_softens_every_row_by_its_exit():
    answers = [np.log([[0.7, 0.3], [0.7, 0.3]]), np.log([[0.2, 0.8], [0.2, 0.8]])]
    p = mixture(answers, np.array([0, 1]), [1.0, 2.0])
    np.testing.assert_allclose(p, [[0.7, 0.3], [1 / 3, 2 / 3]])


def test_chosen_thresholds_keep_to_their_budget_and_dearer_ones_are_no_worse():
    rng = np.random.default_rng(0)
    scores, losses = rng.random((400, 2)), rng.random((400, 3)) + np.array([0.4, 0.2, 0.0])

    def costs(first, second):
        return np.array([0.4, 0.7, 1.0]) + 0.01 * np.array([first, first + second, first + second])

    curve = Curve(scores, losses, costs)
    chosen = choose_confidences(curve, [0.1, 0.45, 0.6, 0.8, 1.1])
    assert 0.1 not in chosen
    found = [curve.at(pair) for pair in chosen.values()]
    assert all(cost <= budget for budget, (cost, _) in zip(chosen, found, strict=True))
    assert sorted((loss for _, loss in found), reverse=True) == [loss for _, loss in found]
    assert curve.at(chosen[1.1])[1] <= losses[:, 2].mean()


def test_a_gate_sees_confidence_and_does_not_move_its_head(network):
    _, exits = network
    logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    p = logits.softmax(-1)[0].detach()
    shown = [p[0], p[0] - p[1], -(p * p.log()).sum()]
    torch.testing.assert_close(confidence(logits)[0].detach(), torch.stack(shown))
    assert not exits.gate(0, logits).requires_grad


def separable(exits, n=300):
    """Features from which every head can tell two of three classes, and the third only at the end."""
    torch.manual_seed(2)
    y = torch.randint(3, (n,))
    pooled = [torch.randn(n, head.mean.numel()) for head in exits.heads]
    for k, features in enumerate(pooled):
        features[:, 0] += 8.0 * (y == 0)
        features[:, 1] += 8.0 * (y == 1) * (k == 2)
    onehot = torch.nn.functional.one_hot(y, 3).float()
    return Cache(pooled, torch.zeros(n, 3), onehot, onehot)


def test_gates_send_home_what_is_easy_and_all_when_compute_is_dear(tmp_path):
    exits = Exits(ResNetConfig(classes=3, width=8), grid=1, hidden=8)
    found = separable(exits)
    heads = train_heads(exits, found.pooled, found.labels, RECIPE, tmp_path / "heads")
    easy = found.labels[:, 0] == 1
    leaves = {}
    for price in (0.6, 20.0):
        args = (heads, found, found.labels, [0.4, 0.7, 1.0], price, RECIPE, tmp_path / str(price))
        joint = train_jointly(*args)
        with torch.inference_mode():
            leaves[price] = joint.gate(0, joint.heads[0](found.pooled[0])) >= 0.5
    assert leaves[0.6][easy].float().mean() > 0.9
    assert leaves[0.6][~easy].float().mean() < 0.5
    assert leaves[20.0].float().mean() > 0.9


def test_a_cache_holds_the_sources_stages_and_the_ensembles_mean(network):
    source, exits = network
    other = ResNet(source.config).eval().requires_grad_(False)
    x = pixels(4)
    found = cache([source, other], exits, x, np.array([0, 1, 2, 0]))
    torch.testing.assert_close(found.source, source(x), rtol=1e-4, atol=1e-5)
    mean = (source(x).softmax(-1) + other(x).softmax(-1)) / 2
    torch.testing.assert_close(found.ensemble, mean, rtol=1e-4, atol=1e-5)
    assert found.labels.argmax(1).tolist() == [0, 1, 2, 0]
    assert [p.shape[1] for p in found.pooled] == [head.mean.numel() for head in exits.heads]


def run(*args):
    return CliRunner().invoke(app, ["exits", *map(str, args)])


def test_the_command_end_to_end(tmp_path, data):  # noqa: F811
    folder = make_zoo(tmp_path, evaluations=1)
    few = ("--steps", 3, "--repeats", 1, "--prices", "0.1", "--budgets", "0.7,1.3")
    refused = run(folder, "--data", data, *few)
    assert "did not see" in str(refused.exception)
    write_json(folder / "config.json", read_config(folder) | {"trained_on": {"images": 500}})
    done = run(folder, "--data", data, *few)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    names = {row["name"] for row in rows}
    assert {"single", "bridge", "ensemble", "cascade, 10 % asked", "exit 1 alone", "gates, lambda 0.1"} <= names
    single = next(row for row in rows if row["name"] == "single")
    assert (single["cost"], single["gains"]["single"]["value"]) == (1.0, 0.0)
    for row in rows:
        assert sum(row["left"]) == pytest.approx(1.0)
        assert row["nll"]["value"] > 0
        assert row["nll"]["se"] > 0
    alone = [row["cost"] for row in rows if row["name"].endswith("alone")]
    assert alone == sorted(alone[:3]) * 3
    assert {row["time"] is None for row in rows if row["name"].startswith("exit")} == {False}
