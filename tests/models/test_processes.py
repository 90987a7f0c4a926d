"""The `process` table of config.json: what it makes, and what it refuses by name."""

import math

import numpy as np
import pytest

from models.api import UserError
from models.solvers.process import from_config, solvers_for
from models.solvers.vp import Cosine, Discrete
from tests.models.solving import LINEAR, PROCESSES, SQUARED, discrete, edm, exact_output

DISCRETE = {"kind": "discrete", "betas": LINEAR, "prediction": "epsilon"}


def test_the_shipped_table_is_the_cosine_process():
    process = from_config({"prediction": "v", "clip": 1.0})
    assert process == Cosine(prediction="v", clip=1.0)
    point = process.at(0.25)
    assert (point.t, point.u) == (0.25, 0.25)
    assert (point.alpha, point.sigma) == (math.cos(math.pi / 8), math.sin(math.pi / 8))
    assert (process.at(1.0).alpha, process.at(0.0).sigma) == (0.0, 0.0)


def test_only_known_solvers_fit_a_process():
    assert solvers_for(PROCESSES["discrete-v"])[:2] == ("ddpm", "ddim")
    assert "euler_maruyama" not in solvers_for(PROCESSES["discrete-v"])
    assert "euler_maruyama" in solvers_for(PROCESSES["vpsde-v"])
    assert solvers_for(edm()) == ("euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
    assert solvers_for(edm()) == solvers_for(PROCESSES["flow"])


@pytest.mark.parametrize("key", [k for k in PROCESSES if k != "edm-v"])
def test_conversions_undo_the_network(key):
    """From what a perfect network answers, denoise and noise give back data and noise."""
    process = PROCESSES[key]
    for ratio in (0.05, 1.0, 20.0):
        point = process.at_ratio(ratio)
        x = np.array([-1.5, 0.2, 2.0])
        o = exact_output(process, point, x)
        row = process.denoise(point)
        m = row["c_x"] * x + row["c_o"] * o
        if process.kind != "edm":
            n_x, n_o = process.noise(point)
            np.testing.assert_allclose(point.alpha * m + point.sigma * (n_x * x + n_o * o), x, rtol=1e-12)
        spread = point.alpha**2 * 0.25 + point.sigma**2
        np.testing.assert_allclose(m, 0.3 + point.alpha * 0.25 / spread * (x - point.alpha * 0.3), rtol=1e-9)


def test_zero_terminal_snr_ends_in_pure_noise():
    plain, scaled = discrete("v"), discrete("v", zero_terminal_snr=True)
    assert scaled.alpha_bar[-1] == 0.0
    assert scaled.alpha_bar[0] == pytest.approx(plain.alpha_bar[0])
    assert np.isfinite(scaled.ratios).all()
    assert (np.diff(scaled.alpha_bar) < 0).all()


def test_trained_betas_are_taken_as_they_are():
    betas = np.linspace(0.01, 0.2, 10).tolist()
    process = from_config({**DISCRETE, "timesteps": 10, "betas": {"trained": betas}})
    assert isinstance(process, Discrete)
    np.testing.assert_allclose(process.alpha_bar, np.cumprod(1 - np.array(betas)))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"kind": "cubic"}, "process.kind"),
        ({"kind": ["cosine"]}, "process.kind"),
        ({"prediction": "epsilon"}, "process.prediction"),
        ({"prediction": "x0"}, "process.prediction"),
        ({"clip": 0.0}, "process.clip"),
        ({"clip": "1"}, "process.clip"),
        ({"clip": math.nan}, "process.clip"),
        ({"grid": "spiral"}, "process.grid"),
        ({"beta_min": 0.1}, "process.beta_min"),
        ({"kind": "discrete", "prediction": "v"}, "process.betas"),
        ({"kind": "discrete", "betas": LINEAR}, "process.prediction"),
        (DISCRETE | {"timesteps": 1000.5}, "process.timesteps"),
        (DISCRETE | {"timesteps": True}, "process.timesteps"),
        (DISCRETE | {"timesteps": 1}, "process.timesteps"),
        (DISCRETE | {"betas": {"schedule": "cosine"}}, "process.betas.schedule"),
        (DISCRETE | {"betas": {"schedule": "linear", "start": 1e-4}}, "process.betas.end"),
        (DISCRETE | {"betas": LINEAR | {"middle": 1}}, "process.betas"),
        (DISCRETE | {"betas": {"trained": [0.1, 0.2]}}, "process.betas.trained"),
        (DISCRETE | {"betas": {"schedule": "linear", "start": 0.0, "end": 1.5}}, "process.betas"),
        (DISCRETE | {"zero_terminal_snr": True}, "process.prediction"),
        (DISCRETE | {"learned_variance": 1}, "process.learned_variance"),
        (DISCRETE | {"final_alpha": "two"}, "process.final_alpha"),
        (DISCRETE | {"steps_offset": -1}, "process.steps_offset"),
        ({"kind": "vpsde"}, "process.prediction"),
        ({"kind": "vpsde", "prediction": "v", "beta_min": 30.0}, "process.beta_min"),
        ({"kind": "edm", "prediction": "sample"}, "process.prediction"),
        ({"kind": "edm", "prediction": "v", "sigma_min": 100.0}, "process.sigma_min"),
        ({"kind": "edm", "prediction": "v", "rho": 0}, "process.rho"),
        ({"kind": "flow", "prediction": "v"}, "process.prediction"),
        ({"kind": "flow", "shift": 0.0}, "process.shift"),
        ({"kind": "flow", "timesteps": 1}, "process.timesteps"),
    ],
)
def test_a_bad_table_is_refused_by_name(table, named):
    with pytest.raises(UserError, match=f"^{named}:"):
        from_config(table)


def test_squared_cosine_needs_no_start_and_end():
    assert (discrete(betas=SQUARED).alpha_bar == discrete(betas=SQUARED | {"start": 1, "end": 2}).alpha_bar).all()


def test_the_time_of_edm_is_the_quantile_of_its_training_noise():
    process = edm(p_mean=-0.4, p_std=2.0)
    for deviations, quantile in ((-1, 0.15865525), (0, 0.5), (1, 0.84134475)):
        point = process.at_ratio(math.exp(-0.4 + 2.0 * deviations))
        assert point.u == pytest.approx(quantile)
        assert point.t == pytest.approx(0.25 * (-0.4 + 2.0 * deviations))
