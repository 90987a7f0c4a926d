"""Grids: diffusers' own where it has them, to the last digit of what it stores; the definition elsewhere."""

from dataclasses import replace

import numpy as np
import pytest

from models.api import SolverOptions
from models.solvers.grids import grids_for, path
from models.solvers.options import SolverError
from tests.models import diffusers_loops
from tests.models.diffusers_loops import float64  # noqa: F401  # a fixture
from tests.models.solving import LINEAR, SCALED, SQUARED, cosine, discrete, edm, flow, vpsde

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

TIMES, LEVELS = ("linspace", "leading", "trailing"), ("karras", "exponential")
FAMILIES = {"index": "ddpm", "level": "euler", "multistep": "unipc"}
DISCRETE = {
    "linear": discrete("epsilon", LINEAR),
    "scaled": discrete("v", SCALED, steps_offset=1),
    "squared": discrete("sample", SQUARED),
    "zero-snr": discrete("v", SCALED, zero_terminal_snr=True),
    "few": discrete("epsilon", LINEAR | {"end": 0.2}, timesteps=100),
}
CONTINUOUS = {"cosine": cosine(), "vpsde": vpsde()}


def points(process, steps, grid, family, **options):
    return path(process, steps, SolverOptions(grid=grid, **options), family).points


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", TIMES + LEVELS)
@pytest.mark.parametrize("key", DISCRETE)
def test_discrete_grids_are_those_of_diffusers(key, grid, family):
    process = DISCRETE[key]
    if grid not in grids_for(process, family):
        assert family == "index"
        return
    for steps in (1, 2, 7, 10, 30, 50, 99):
        if process.timesteps == 100 and steps == 99 and family == "multistep" and grid == "linspace":
            continue  # repeats times, and is refused
        if steps == 1 and family != "multistep" and grid not in ("leading", "trailing"):
            first = points(process, 1, grid, family)[0]  # diffusers begins, and ends, at time 0, where no noise is
            assert first.t == pytest.approx(process.timesteps - 1)
            continue
        theirs = diffusers_loops.scheduler(FAMILIES[family], process, grid, steps)
        ours = points(process, steps, grid, family)
        np.testing.assert_allclose([p.t for p in ours[:-1]], theirs.timesteps.numpy(), rtol=1e-9, atol=1e-9)
        if family != "index":
            np.testing.assert_allclose([p.ratio for p in ours], theirs.sigmas.numpy(), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "grid"), [("euler", "linspace"), *(("euler", g) for g in LEVELS), ("dpmpp_2m", "linspace")]
)
def test_flow_grids_are_those_of_diffusers(name, grid, shift):
    process = flow(shift=shift)
    for steps in (1, 2, 10, 28):
        theirs = diffusers_loops.scheduler(name, process, grid, steps)
        ours = points(process, steps, grid, "level" if name == "euler" else "multistep")
        np.testing.assert_allclose([p.sigma for p in ours], theirs.sigmas.numpy(), rtol=1e-9)
        np.testing.assert_allclose([p.t for p in ours[:-1]], theirs.timesteps.numpy(), rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", LEVELS)
def test_edm_grids_are_those_of_diffusers(grid):
    for steps in (2, 10, 40):
        theirs = diffusers_loops.scheduler("euler", edm(), grid, steps)
        ours = points(edm(), steps, grid, "level")
        np.testing.assert_allclose([p.sigma for p in ours], theirs.sigmas.numpy(), rtol=1e-9)
        np.testing.assert_allclose([p.t for p in ours[:-1]], theirs.timesteps.numpy(), rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grid", ["linspace", "trailing"])
@pytest.mark.parametrize("key", CONTINUOUS)
def test_continuous_time_is_divided_evenly_from_noise_to_data(key, grid, family):
    ours = points(CONTINUOUS[key], 8, grid, family)
    assert [p.u for p in ours] == [1 - i / 8 for i in range(9)]
    assert (ours[-1].alpha, ours[-1].sigma) == (1.0, 0.0)


@pytest.mark.parametrize("process", [cosine(), vpsde(), discrete(), edm(), flow(shift=2.0)], ids=lambda p: p.kind)
def test_logsnr_is_even_in_log_snr(process):
    ours = points(process, 9, "logsnr", "level")[:-1]
    steps = np.diff([p.log_snr for p in ours])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert ours[0].ratio == pytest.approx(process.highest.ratio)
    assert ours[-1].ratio == pytest.approx(process.lowest.ratio)


@pytest.mark.parametrize("process", [cosine(), vpsde(), discrete(), edm(), flow()], ids=lambda p: p.kind)
def test_a_run_may_end_at_the_least_noise(process):
    for grid in grids_for(process, "multistep"):
        ours = points(process, 9, grid, "multistep", final_sigma="sigma_min")
        assert len(ours) == 10
        assert ours[-1].ratio == pytest.approx(process.lowest.ratio)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("process", [cosine(), vpsde(), discrete(), edm(), flow()], ids=lambda p: p.kind)
def test_the_models_own_grid_is_used_where_it_fits(process, family):
    known = grids_for(process, family)
    for grid in ("linspace", "leading", "trailing", *LEVELS, "logsnr"):
        own = replace(process, grid=grid)
        chosen = points(own, 6, None, family)
        assert chosen == points(process, 6, grid if grid in known else known[0], family)


@pytest.mark.parametrize("process", [cosine(), vpsde(), flow(shift=3.0)], ids=lambda p: p.kind)
def test_a_noise_level_finds_its_own_point(process):
    for time in (0.01, 0.3, 0.9):
        point = process.at(time)
        back = process.at_ratio(point.ratio)
        assert (back.t, back.u, back.alpha) == pytest.approx((point.t, point.u, point.alpha), rel=1e-9)


def test_zero_terminal_snr_never_turns_back():
    """On the linear schedule the times before the last have less signal than diffusers gives the last."""
    process = discrete("v", LINEAR, zero_terminal_snr=True)
    assert (np.diff(process.ratios) >= 0).all()
    assert process.ratios[-1] == pytest.approx(4096, rel=1e-6)
    with pytest.raises(SolverError, match="separate steps"):
        points(process, 1000, "linspace", "level")
