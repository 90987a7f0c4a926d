"""Requests that make no sense are refused, with the field at fault and what to do instead."""

import math

import pytest

from models.solvers.options import SolverError
from tests.models.solving import LINEAR, cosine, discrete, edm, flow, solve, vpsde

FEW = discrete(betas=LINEAR | {"end": 0.2}, timesteps=100)
OFFSET = discrete(steps_offset=1)


@pytest.mark.parametrize(
    ("name", "process", "steps", "options", "field", "says"),
    [
        ("ddpm", flow(), 5, {}, "solver", "flow"),
        ("ddpm", edm(), 5, {}, "solver", "edm"),
        ("ddim", flow(), 5, {}, "solver", "flow"),
        ("euler_maruyama", discrete(), 5, {}, "solver", "vpsde"),
        ("euler_maruyama", edm(), 5, {}, "solver", "cosine"),
        ("ddpm", cosine(), 0, {}, "steps", "at least 1"),
        ("ddpm", FEW, 101, {}, "steps", "100"),
        ("euler", FEW, 101, {}, "steps", "100"),
        ("dpmpp_2m", FEW, 100, {}, "steps", "fewer"),
        ("ddpm", OFFSET, 1000, {"grid": "leading"}, "steps", "fewer"),
        ("dpmpp_2m", vpsde(), 1000, {"final_sigma": "sigma_min"}, "steps", "fewer"),
        ("ddpm", discrete(), 5, {"grid": "karras"}, "solver_options.grid", "linspace, leading, trailing"),
        ("ddim", discrete(), 5, {"grid": "logsnr"}, "solver_options.grid", "linspace, leading, trailing"),
        ("euler", cosine(), 5, {"grid": "leading"}, "solver_options.grid", "trailing"),
        ("euler", edm(), 5, {"grid": "linspace"}, "solver_options.grid", "karras"),
        ("heun", flow(), 5, {"grid": "leading"}, "solver_options.grid", "trailing"),
        ("ddpm", discrete(), 5, {"variance": "learned_range"}, "solver_options.variance", "fixed_small"),
        ("ddpm", cosine(), 5, {"variance": "learned_range"}, "solver_options.variance", "fixed_small"),
        ("ddpm", cosine(), 5, {"eta": 0.5}, "solver_options.eta", "variance"),
        ("ddim", cosine(), 5, {"churn": 5.0}, "solver_options.churn", "eta"),
        ("ddim", cosine(), 5, {"variance": "fixed_small"}, "solver_options.variance", "eta"),
        ("euler", cosine(), 5, {"form": "heun"}, "solver_options.form", "churn"),
        ("euler_ancestral", cosine(), 5, {"eta": 1.0}, "solver_options.eta", "grid"),
        ("heun", cosine(), 5, {"corrector": True}, "solver_options.corrector", "churn"),
        ("heun", edm(), 5, {"churn_min": 1.0}, "solver_options.churn_min", "churn above 0"),
        ("euler", edm(), 5, {"churn": 0.0, "churn_noise": 1.0}, "solver_options.churn_noise", "churn above 0"),
        (
            "euler",
            edm(),
            5,
            {"churn": 5.0, "churn_min": 2.0, "churn_max": 1.0},
            "solver_options.churn_min",
            "churn_max",
        ),
        ("euler", flow(), 5, {"churn": 5.0}, "solver_options.churn", "flow"),
        ("dpmpp_2m", cosine(), 5, {"form": "bh1"}, "solver_options.form", "midpoint or heun"),
        ("dpmpp_2m_sde", cosine(), 5, {"corrector": False}, "solver_options.corrector", "form"),
        ("unipc", cosine(), 5, {"form": "midpoint"}, "solver_options.form", "bh2 or bh1"),
        (
            *("unipc", discrete(), 5, {"form": "bh1", "final_sigma": "zero"}),
            *("solver_options.final_sigma", "sigma_min"),
        ),
        ("unipc", cosine(), 5, {"form": "bh1"}, "solver_options.form", "logsnr"),
        ("unipc", flow(), 5, {"form": "bh1", "grid": "trailing"}, "solver_options.form", "bh2"),
        ("unipc", discrete(), 5, {"lower_order_final": False}, "solver_options.lower_order_final", "sigma_min"),
    ],
)
def test_the_field_at_fault_is_named(name, process, steps, options, field, says):
    with pytest.raises(SolverError, match=says) as caught:
        solve(name, process, steps, **options)
    assert caught.value.field == field


def test_bh1_chooses_the_end_that_it_needs():
    assert (
        solve("unipc", discrete(), 5, form="bh1").coef
        == solve("unipc", discrete(), 5, form="bh1", final_sigma="sigma_min").coef
    ).all()


def test_zero_churn_is_no_churn():
    assert (solve("heun", edm(), 5, churn=0.0).coef == solve("heun", edm(), 5).coef).all()


@pytest.mark.parametrize("process", [cosine(), vpsde(), discrete(), edm()], ids=lambda p: p.kind)
def test_churn_outside_its_range_is_no_churn(process):
    """Also where the process begins without signal and no noise can be added."""
    trajectory = solve("euler", process, 5, churn=5.0, churn_min=1e5)
    assert (trajectory.coef == solve("euler", process, 5).coef).all()
    assert math.isfinite(solve("euler", process, 5, churn=5.0).coef[:, 5:].max())


def test_the_range_of_churn_includes_its_ends():
    trajectory = solve("euler", edm(), 5, grid="exponential", churn=1.0, churn_min=80.0, churn_max=80.0)
    assert trajectory.scale == pytest.approx(80.0 * 1.2)
