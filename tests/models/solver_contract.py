"""What every solver owes on every process that it fits: checks for the registry and the docs' example."""

from dataclasses import replace

import numpy as np
import torch

from models.registry import SOLVERS, resolve
from models.solvers.base import DATA
from models.solvers.noise import normal
from models.solvers.table import FIELDS, INDEX
from tests.models.solving import MEAN, PROCESSES, STD, analytic, at_time, exact_state, run, solve, start

NOT_DENOISED = ("euler_maruyama",)  # its last step is one more step of the SDE


def fitting(name):
    """Keys of the PROCESSES that a registered solver fits."""
    return [key for key, process in PROCESSES.items() if resolve(SOLVERS, name).fits(process)]


def check_table(name, process, steps):
    """Finite, the right shapes, u falling within [0, 1], an end without noise."""
    trajectory = solve(name, process, steps)
    evaluations = len(trajectory.coef)
    assert trajectory.coef.shape == (evaluations, len(FIELDS))
    assert trajectory.coef.dtype == np.float64
    assert trajectory.u.shape == (evaluations,)
    assert steps <= evaluations <= 2 * steps
    finite = [i for field, i in INDEX.items() if field != "clip"]
    assert np.isfinite(trajectory.coef[:, finite]).all()
    assert (trajectory.coef[:, INDEX["clip"]] == (process.clip or np.inf)).all()
    assert ((trajectory.u >= 0) & (trajectory.u <= 1)).all()
    assert (np.diff(trajectory.u) <= 0).all()
    assert trajectory.scale > 0
    assert trajectory.coef[-1, INDEX["a_n"]] == 0


def check_end(name, process):
    """The last step returns the denoised estimate."""
    trajectory = solve(name, process, 6)
    x, o = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = trajectory.coef[-1]
    m = row[INDEX["c_x"]] * x + row[INDEX["c_o"]] * o
    if process.clip is not None:
        m = m.clamp(-process.clip, process.clip)
    last = replace(trajectory, coef=row[None], u=trajectory.u[-1:])
    torch.testing.assert_close(run(last, lambda _, t: o, x)[-1], m)


def check_samples(name, process):
    """Seeded noise in, mean and spread of the analytic data out, the same twice."""
    seeds = torch.arange(2000)

    def noise(e):
        return normal(seeds, torch.full_like(seeds, e), (1, 1, 1)).double()

    def sample():
        trajectory = solve(name, process, 80)
        return run(trajectory, analytic(process), noise(-1) * trajectory.scale, noise)[-1]

    out = sample()
    assert abs(out.mean().item() - MEAN) < 0.06
    assert abs(out.std().item() - STD) < 0.08
    assert torch.equal(out, sample())


def check_flow(name, process):
    """Without noise of its own, a solver takes each state where the probability-flow ODE does."""
    trajectory = solve(name, process, 160)
    if (trajectory.coef[:, INDEX["a_n"]] > 0).any():
        return
    out = run(trajectory, analytic(process), start() * trajectory.scale)[-1]
    assert (out - exact_state(DATA, start())).abs().max() < 0.05


def error(name, process, steps, **options):
    """Largest error at the last noise level above none, on a grid even in log-SNR, from an exact start."""
    trajectory = solve(name, process, steps, grid="logsnr", **options)
    first = at_time(process, trajectory.coef[0, INDEX["t"]])
    states = run(trajectory, analytic(process), exact_state(first, start()))
    reached = states[-1] if "final_sigma" in options else states[-2]
    return (reached - exact_state(process.lowest, start())).abs().max().item()
