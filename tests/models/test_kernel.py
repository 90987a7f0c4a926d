"""The fused update and its noise: a row's result is its own, to the bit, whatever shares its batch."""

import numpy as np
import pytest
import torch

from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.process import solvers_for
from models.solvers.table import DEFAULTS, FIELDS, INDEX, fill
from tests.models.solving import PROCESSES, solve

SHAPE = (1, 7, 5)


def test_clip_bounds_the_estimate():
    row = fill([{"c_x": 1.0, "a_m": 1.0, "clip": 0.5}])
    x = torch.tensor([-3.0, 0.2, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    zero = torch.zeros_like(x)
    out = update(torch.tensor(np.repeat(row, 3, 0)), x, zero, zero, zero, zero, zero)[0]
    assert out.flatten().tolist() == [-0.5, 0.2, 0.5]


def test_every_coefficient_does_what_the_table_says():
    """Against the formula written out, on numbers where no two terms can stand for each other."""
    rng = np.random.default_rng(0)
    row = {name: rng.normal() for name in FIELDS} | {"clip": 0.4}
    values = rng.normal(size=(8, 2, 1, 1, 3))
    x, s, h1, h2, o, z, v, _ = values
    m = np.clip(row["c_x"] * x + row["c_o"] * o, -0.4, 0.4)
    y = row["k_x"] * x + row["k_m"] * m + row["k_1"] * h1 + row["k_2"] * h2 + row["k_s"] * s
    new = row["a_y"] * y + row["a_o"] * o + row["a_m"] * m + row["a_1"] * h1 + row["a_2"] * h2 + row["a_s"] * s
    f = (v + 1) / 2
    new += row["a_n"] * np.exp(0.5 * (f * row["lv1"] + (1 - f) * row["lv0"])) * z
    coef = torch.from_numpy(np.repeat(fill([row]), 2, 0))
    got = update(coef, *(torch.from_numpy(value) for value in (x, s, h1, h2, o, z, v)))
    for actual, wanted in zip(got, (new, y, m, h1), strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-12)


def test_unnamed_coefficients_take_their_defaults():
    row = fill([{}])[0]
    for name in FIELDS:
        assert row[INDEX[name]] == DEFAULTS.get(name, 0.0)


def test_learned_variance_of_others_leaves_a_row_alone_to_the_bit():
    rng = torch.Generator().manual_seed(0)
    rows = np.concatenate([solve(name, PROCESSES["cosine-v"], 5).coef for name in ("ddpm", "unipc", "heun")])
    state = [torch.randn(len(rows), *SHAPE, generator=rng) for _ in range(7)]
    coef = torch.tensor(rows, dtype=torch.float32)
    for without, given in zip(update(coef, *state[:6]), update(coef, *state), strict=True):
        assert torch.equal(without, given)


class Request:
    """One row in flight: its table, its registers, the evaluation that it is at."""

    def __init__(self, process, solver, seed):
        trajectory = solve(solver, process, 4)
        self.coef = torch.tensor(trajectory.coef, dtype=torch.float32)
        self.seed = torch.tensor([seed])
        self.state = [normal(self.seed, torch.tensor([-1]), SHAPE) * trajectory.scale]
        self.state += [torch.zeros_like(self.state[0]) for _ in range(3)]
        self.e = 0

    @property
    def finished(self):
        return self.e == len(self.coef)


def network(x, t):
    """Elementwise, so that its bits cannot depend on the batch."""
    return x * 0.7 + (t * 0.01).view(-1, 1, 1, 1), (x * 0.3).clamp(-1, 1)


def tick(requests):
    """One evaluation of every request, in one batch."""
    coef = torch.cat([r.coef[r.e : r.e + 1] for r in requests])
    x, s, h1, h2 = (torch.cat(parts) for parts in zip(*(r.state for r in requests), strict=True))
    z = normal(torch.cat([r.seed for r in requests]), torch.tensor([r.e for r in requests]), SHAPE)
    o, v = network(x * coef[:, INDEX["c_in"], None, None, None], coef[:, INDEX["t"]])
    new = update(coef, x, s, h1, h2, o, z, v)
    for i, request in enumerate(requests):
        request.state = [part[i : i + 1] for part in new]
        request.e += 1


def everything():
    """Every solver on every process that it fits."""
    pairs = [(process, solver) for process in PROCESSES.values() for solver in solvers_for(process)]
    return [Request(process, solver, seed) for seed, (process, solver) in enumerate(pairs)]


def test_all_configurations_mixed_and_staggered_equal_each_alone_bit_for_bit():
    alone, mixed = everything(), everything()
    for request in alone:
        while not request.finished:
            tick([request])
    waiting, running = list(mixed), []
    while waiting or running:
        running = [r for r in running if not r.finished] + [waiting.pop(0) for _ in range(min(9, len(waiting)))]
        if running:
            tick(running)
    for a, b in zip(alone, mixed, strict=True):
        assert a.e == b.e == len(a.coef)
        assert torch.isfinite(a.state[0]).all()
        for left, right in zip(a.state, b.state, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("n", [2, 3, 8, 17])
def test_rows_of_a_batch_of_any_size_have_their_own_bits(n):
    """At the shape that the zoo serves, where vectorised loops have other tails."""
    rng = torch.Generator().manual_seed(n)
    rows = np.concatenate([solve(s, PROCESSES["discrete-v"], 7).coef for s in ("unipc", "heun", "dpmpp_2m_sde")])[:n]
    coef = torch.tensor(rows, dtype=torch.float32)
    state = [torch.randn(n, 1, 28, 28, generator=rng) for _ in range(7)]
    together = update(coef, *state)
    for i in range(n):
        for a, b in zip(update(coef[i : i + 1], *(part[i : i + 1] for part in state)), together, strict=True):
            assert torch.equal(a[0], b[i])


def test_noise_is_a_function_of_seed_and_evaluation():
    seeds = torch.tensor([7, 2**53 - 1, 7, 0])
    evaluations = torch.tensor([-1, 3, 4, -1])
    together = normal(seeds, evaluations, (1, 28, 28))
    for i in range(4):
        assert torch.equal(normal(seeds[i : i + 1], evaluations[i : i + 1], (1, 28, 28))[0], together[i])
    assert not torch.equal(together[0], together[2])


def test_noise_is_standard_normal_and_uncorrelated():
    seeds = torch.arange(2000)
    z = normal(seeds, torch.full_like(seeds, 5), (1, 10, 10)).flatten(1).double()
    assert abs(z.mean().item()) < 0.01
    assert abs(z.var().item() - 1) < 0.01
    assert abs((z**4).mean().item() - 3) < 0.1
    neighbours = (z[:-1] * z[1:]).mean().abs().item()
    within = (z[:, :-1] * z[:, 1:]).mean().abs().item()
    assert max(neighbours, within) < 0.01
