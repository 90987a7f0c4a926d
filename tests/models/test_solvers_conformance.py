"""Every solver against diffusers' step loops: the same network, start and noise must give the same final state.

Both sides run in float64 (diffusers_loops.py), so the tolerance is far below the 2e-6 that float32 allows. Where
diffusers departs from the publication and the product does not follow, a comment here says so.
"""

import itertools

import pytest
import torch

from tests.models import diffusers_loops
from tests.models.diffusers_loops import float64  # noqa: F401  # a fixture
from tests.models.solving import LINEAR, SCALED, SQUARED, Fixed, analytic, discrete, edm, flow, run, solve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers

TOLERANCE = 1e-9
TIMES = ("linspace", "leading", "trailing")
LEVELS = ("karras", "exponential")
SHAPE = (16, 1, 2, 2)

DISCRETE = {
    "epsilon": discrete("epsilon", LINEAR),
    "v": discrete("v", SCALED),
    "sample": discrete("sample", SQUARED),
    "offset": discrete("epsilon", SCALED, steps_offset=1),
    "zero-snr": discrete("v", SCALED, zero_terminal_snr=True),
}
CLIPPED = {"clip": discrete("epsilon", LINEAR, clip=1.0), "first": discrete("v", LINEAR, final_alpha="first")}
EDM = {"edm-epsilon": edm(), "edm-v": edm("v")}
FLOW = {"flow": flow(), "flow-shift": flow(shift=3.0)}
PROCESSES = DISCRETE | CLIPPED | EDM | FLOW | {"learned": discrete(learned_variance=True)}


def noises(count):
    """Start and the noise of each evaluation, float64. None on the last: where the run does not end at trained time
    0, diffusers' DDPM adds some to the finished sample, the paper none (Ho et al., 2020, algorithm 2)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count + 1, *SHAPE, generator=generator, dtype=torch.float64)
    z[-1] = 0
    return z[0], lambda e: z[e + 1]


def distance(name, process, grid, steps, options, config, step, monkeypatch, dtype=torch.float64):
    """Largest difference of the final states, relative to the largest of theirs, over both networks."""
    trajectory = solve(name, process, steps, grid=grid, **options)
    x, noise = noises(len(trajectory.coef))

    def variance(e):
        return torch.tanh(noise(e).flip(0))

    learned = variance if config.get("variance_type") == "learned_range" else None
    worst = 0.0
    for network in (analytic(process), Fixed(process)):
        ours = run(trajectory, network, (x * trajectory.scale).to(dtype), noise, learned)[-1]
        made = diffusers_loops.scheduler(name, process, grid, steps, **config)
        # EDM schedulers start from sqrt(sigma_max^2 + 1), Karras et al. and the product from sigma_max.
        scale = process.sigma_max if process.kind == "edm" else float(getattr(made, "init_noise_sigma", 1.0))
        theirs = diffusers_loops.loop(made, network, x * scale, noise, monkeypatch, learned, **step)
        worst = max(worst, ((ours.double() - theirs).abs().max() / theirs.abs().max()).item())
    return worst


def plain(name, process, grid):
    """Solvers without options that diffusers has."""
    return [(steps, {}, {}, {}) for steps in (10, 30)]


def ddpm(name, process, grid):
    kinds = ("learned_range",) if process.learned_variance else ("fixed_small", "fixed_large")
    return [(steps, {"variance": k}, {"variance_type": k}, {}) for steps in (10, 30) for k in kinds]


def ddim(name, process, grid):
    return [(steps, {"eta": eta}, {}, {"eta": eta}) for steps in (10, 30) for eta in (0.0, 0.5, 1.0)]


def ends(process, grid):
    """(ours, theirs) of how a multistep run ends. With noise levels and sigma_min, diffusers repeats the last level,
    a step that goes nowhere (and NaN in UniPC); the product spreads the same number of steps to end there."""
    yield {}, {}
    if process.kind == "discrete" and grid in TIMES:
        for lower in (True, False):
            yield (
                {"final_sigma": "sigma_min", "lower_order_final": lower},
                {"final_sigmas_type": "sigma_min", "lower_order_final": lower},
            )


def dpmpp(name, process, grid):
    # With one step, diffusers' exponential EDM grid starts at its end.
    steps = (2, 14, 15) if process.kind == "edm" else (1, 2, 14, 15)
    for n, form, (ours, theirs) in itertools.product(steps, ("midpoint", "heun"), ends(process, grid)):
        yield n, {"form": form} | ours, {"solver_type": form} | theirs, {}


def unipc(name, process, grid):
    for n, form, corrector, (ours, theirs) in itertools.product(
        (1, 2, 10, 25), ("bh1", "bh2"), (True, False), ends(process, grid)
    ):
        if form == "bh1" and not ours:
            continue  # NaN in diffusers, refused by the product
        off = {} if corrector else {"disable_corrector": list(range(n))}
        yield n, {"form": form, "corrector": corrector} | ours, {"solver_type": form} | off | theirs, {}


def cases():
    """(solver, process, grid, variants) of everything that diffusers has."""
    for key, grid in itertools.product(DISCRETE | CLIPPED, TIMES):
        if key != "first":
            yield "ddpm", key, grid, ddpm
        yield "ddim", key, grid, ddim
    for grid in TIMES:
        yield "ddpm", "learned", grid, ddpm
    for key, grid in itertools.product(DISCRETE, TIMES + LEVELS):
        yield "euler", key, grid, plain
        if grid in TIMES and key != "sample":
            yield "euler_ancestral", key, grid, plain
        if key != "zero-snr":
            yield "heun", key, grid, plain
        yield "unipc", key, grid, unipc
    for grid in TIMES + LEVELS:
        yield "heun", "clip", grid, plain
    for name, key, grid in itertools.product(("dpmpp_2m", "dpmpp_2m_sde"), DISCRETE, (*TIMES, *LEVELS, "logsnr")):
        # On this schedule DPM-Solver cuts network times to whole numbers where UniPC rounds; the product rounds.
        if key != "sample" or grid not in ("karras", "logsnr"):
            yield name, key, grid, dpmpp
    for key, grid in itertools.product(EDM, LEVELS):
        yield "euler", key, grid, plain
        yield "dpmpp_2m", key, grid, dpmpp
        yield "dpmpp_2m_sde", key, grid, dpmpp
    for key in FLOW:
        yield from (("euler", key, grid, plain) for grid in ("linspace", *LEVELS))
        yield "heun", key, "linspace", plain
        yield "dpmpp_2m", key, "linspace", dpmpp
        yield "dpmpp_2m_sde", key, "linspace", dpmpp
        yield "unipc", key, "linspace", unipc


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "key", "grid", "variants"), list(cases()))
def test_the_final_state_is_that_of_diffusers(name, key, grid, variants, monkeypatch):
    for variant in variants(name, PROCESSES[key], grid):
        apart = distance(name, PROCESSES[key], grid, *variant, monkeypatch)
        assert apart <= TOLERANCE, (variant, apart)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("key", ["epsilon", "v", "learned"])
def test_a_thousand_ancestral_steps(key, monkeypatch):
    kind = "learned_range" if key == "learned" else "fixed_small"
    variant = (1000, {"variance": kind}, {"variance_type": kind}, {})
    assert distance("ddpm", PROCESSES[key], "leading", *variant, monkeypatch) <= TOLERANCE
    assert distance("ddpm", PROCESSES[key], "leading", *variant, monkeypatch, torch.float32) <= 2e-5


SERVED = {
    "epsilon": ("ddim", "euler", "heun", "dpmpp_2m", "unipc"),
    "v": ("ddim", "euler", "heun", "dpmpp_2m", "unipc"),
    "zero-snr": ("ddim", "euler", "dpmpp_2m", "unipc"),
    "edm-epsilon": ("euler", "dpmpp_2m"),
    "flow": ("euler", "heun", "dpmpp_2m", "unipc"),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in SERVED.items() for name in names])
def test_float32_as_served_stays_close(name, key, monkeypatch):
    """The kernel's own precision against float64 loops, at the steps that people use."""
    grid = "karras" if key == "edm-epsilon" else "linspace"
    apart = distance(name, PROCESSES[key], grid, 50, {}, {}, {}, monkeypatch, torch.float32)
    assert apart <= 2e-6
