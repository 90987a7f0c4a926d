"""Solvers on the analytic model: data of one Gaussian, whose exact v is known."""

import math

import numpy as np
import pytest
import torch

from models.registry import SOLVERS, resolve
from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.table import DEFAULTS, FIELDS, INDEX, Process, fill, uniform_grid

MEAN, STD = 0.3, 0.5


def exact_v(x, u):
    """v of data N(MEAN, STD^2): v = alpha E[e | x] - sigma E[x0 | x]."""
    alpha, sigma = math.cos(0.5 * math.pi * u), math.sin(0.5 * math.pi * u)
    var = alpha**2 * STD**2 + sigma**2
    x0 = MEAN + alpha * STD**2 / var * (x - alpha * MEAN)
    noise = sigma / var * (x - alpha * MEAN)
    return alpha * noise - sigma * x0


def flow(x1):
    """Where the probability-flow ODE takes x1 at u = 1 (standard normal) exactly: same quantile of the data."""
    return MEAN + STD * x1


def sample(solver, steps, x, seeds=None, times=None):
    table = resolve(SOLVERS, solver)(Process(), uniform_grid(steps) if times is None else times)
    s, h1, h2 = (torch.zeros_like(x) for _ in range(3))
    for e, row in enumerate(table):
        coef = torch.tensor(np.repeat(row[None], len(x), 0))
        o = exact_v(x, row[INDEX["t"]])
        z = torch.zeros_like(x)
        if seeds is not None:
            z = normal(seeds, torch.full_like(seeds, e), x.shape[1:]).to(x.dtype)
        x, s, h1, h2 = update(coef, x, s, h1, h2, o, z)
    return x


def start(n=64):
    return torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1, 1, 1)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order):
    """Inside (0, 1): at the ends lambda is infinite and its steps do not shrink with their number."""

    def at(u):
        alpha, sigma = math.cos(0.5 * math.pi * u), math.sin(0.5 * math.pi * u)
        return alpha * MEAN + math.hypot(alpha * STD, sigma) * start()

    errors = [
        (sample(solver, n, at(0.9), times=np.linspace(0.9, 0.1, n + 1)) - at(0.1)).abs().max().item() for n in (40, 80)
    ]
    assert errors[1] < 0.02
    assert order - 0.2 < math.log2(errors[0] / errors[1]) < order + 0.6


def test_dpmpp_2m_beats_ddim_at_equal_steps():
    x = start()
    assert (sample("dpmpp_2m", 20, x) - flow(x)).abs().max() < 0.5 * (sample("ddim", 20, x) - flow(x)).abs().max()


def test_ddpm_reaches_the_data_distribution():
    seeds = torch.arange(4000)
    x = normal(seeds, torch.full_like(seeds, -1), (1, 1, 1)).double()
    out = sample("ddpm", 200, x, seeds).flatten()
    assert abs(out.mean().item() - MEAN) < 0.03
    assert abs(out.std().item() - STD) < 0.03


def test_ddpm_adds_no_noise_at_the_end():
    table = resolve(SOLVERS, "ddpm")(Process(), uniform_grid(10))
    assert table[-1, INDEX["a_n"]] == 0
    assert (table[:-1, INDEX["a_n"]] > 0).all()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_coefficients_are_finite_and_one_row_per_step(solver, steps):
    table = resolve(SOLVERS, solver)(Process(clip=1.0), uniform_grid(steps))
    assert table.shape == (steps, len(FIELDS))
    assert np.isfinite(table).all()


def test_the_last_step_returns_the_denoised_estimate():
    x, o = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    zero = torch.zeros_like(x)
    for solver in SOLVERS:
        row = resolve(SOLVERS, solver)(Process(), uniform_grid(4))[-1]
        coef = torch.tensor(np.repeat(row[None], 5, 0))
        m = row[INDEX["c_x"]] * x + row[INDEX["c_o"]] * o
        torch.testing.assert_close(update(coef, x, zero, zero, zero, o, zero)[0], m)


def test_clip_bounds_the_estimate():
    row = fill([{"c_x": 1.0, "a_m": 1.0, "clip": 0.5}])
    x = torch.tensor([-3.0, 0.2, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    zero = torch.zeros_like(x)
    out = update(torch.tensor(np.repeat(row, 3, 0)), x, zero, zero, zero, zero, zero)[0]
    assert out.flatten().tolist() == [-0.5, 0.2, 0.5]


def test_unnamed_coefficients_take_their_defaults():
    row = fill([{}])[0]
    for name in FIELDS:
        assert row[INDEX[name]] == DEFAULTS.get(name, 0.0)


def test_rows_of_different_solvers_share_a_batch_bit_for_bit():
    rng = torch.Generator().manual_seed(0)
    rows = np.concatenate([resolve(SOLVERS, s)(Process(clip=1.0), uniform_grid(7)) for s in sorted(SOLVERS)])
    coef = torch.tensor(rows, dtype=torch.float32)
    state = [torch.randn(len(rows), 1, 28, 28, generator=rng) for _ in range(6)]
    together = update(coef, *state)
    for i in range(len(rows)):
        alone = update(coef[i : i + 1], *(t[i : i + 1] for t in state))
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])


def test_unsupported_prediction_is_named():
    with pytest.raises(ValueError, match="epsilon"):
        Process(prediction="epsilon")


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
