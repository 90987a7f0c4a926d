"""What every registered solver owes, on every process that it fits. A new solver is tested here by being registered."""

import numpy as np
import pytest
import torch

from models.registry import SOLVERS, resolve
from models.solvers.base import DATA
from models.solvers.noise import normal
from models.solvers.process import solvers_for
from models.solvers.table import FIELDS, INDEX, Trajectory
from tests.models.solving import MEAN, PROCESSES, STD, analytic, exact_state, run, solve, start

PAIRS = [(name, kind) for name in SOLVERS for kind, process in PROCESSES.items() if name in solvers_for(process)]
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "euler_maruyama")
NOT_DENOISED = ("euler_maruyama",)  # solvers whose last step is not the denoised estimate

pairs = pytest.mark.parametrize(("name", "kind"), PAIRS)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 500])
@pairs
def test_the_table_is_finite_and_falls_from_noise_to_data(name, kind, steps):
    process = PROCESSES[kind]
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


@pairs
def test_the_last_step_returns_the_denoised_estimate(name, kind):
    if name in NOT_DENOISED:
        pytest.skip("its last step is one more step of the SDE")
    process = PROCESSES[kind]
    trajectory = solve(name, process, 6)
    generator = torch.Generator().manual_seed(0)
    x, o = torch.randn(2, 5, 1, 2, 2, generator=generator, dtype=torch.float64)
    row = trajectory.coef[-1]
    m = row[INDEX["c_x"]] * x + row[INDEX["c_o"]] * o
    if process.clip is not None:
        m = m.clamp(-process.clip, process.clip)
    last = Trajectory(row[None], trajectory.u[-1:], trajectory.scale)
    torch.testing.assert_close(run(last, lambda _, t: o, x)[-1], m)


@pairs
def test_it_samples_the_data_distribution(name, kind):
    """Seeded noise in, mean and spread of the analytic data out."""
    process = PROCESSES[kind]
    if process.clip is not None:
        pytest.skip("clipping bends the analytic data")
    trajectory = solve(name, process, 80)
    seeds = torch.arange(2000)

    def noise(e):
        return normal(seeds, torch.full_like(seeds, e), (1, 1, 1)).double()

    out = run(trajectory, analytic(process), noise(-1) * trajectory.scale, noise)[-1]
    assert abs(out.mean().item() - MEAN) < 0.06
    assert abs(out.std().item() - STD) < 0.08
    again = run(solve(name, process, 80), analytic(process), noise(-1) * trajectory.scale, noise)[-1]
    assert torch.equal(out, again)


@pairs
def test_a_solver_without_noise_follows_the_probability_flow(name, kind):
    process = PROCESSES[kind]
    trajectory = solve(name, process, 160)
    if name in STOCHASTIC or process.clip is not None:
        assert process.clip is not None or (trajectory.coef[:-1, INDEX["a_n"]] > 0).all()
        return
    assert (trajectory.coef[:, INDEX["a_n"]] == 0).all()
    out = run(trajectory, analytic(process), start() * trajectory.scale)[-1]
    assert (out - exact_state(DATA, start())).abs().max() < 0.05


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_declared(name):
    solver = resolve(SOLVERS, name)
    assert solver.name == name
    assert solver.kinds <= {process.kind for process in PROCESSES.values()}
