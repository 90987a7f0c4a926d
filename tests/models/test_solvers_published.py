"""Solvers that diffusers lacks, or has otherwise than published, against a plain transcription of the paper."""

import math

import numpy as np
import pytest
import torch

from models.solvers.table import INDEX
from tests.models.solving import Fixed, analytic, cosine, discrete, edm, run, solve, vpsde

SHAPE = (8, 1, 2, 2)


def noises(count):
    z = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda e: z[e]


def near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


def denoiser(process, network):
    """D(x; sigma) of Karras et al. (2022): equation 7 for EDM, section C.3.4 (x in VE scale) for a VP table."""
    if process.kind == "edm":
        sd = process.sigma_data

        def denoise(x, sigma):
            total = math.sqrt(sigma**2 + sd**2)
            output = network(x / total, 0.25 * math.log(sigma))
            return sd**2 / total**2 * x + sigma * sd / total * output

        return denoise

    logs = np.log(process.ratios)

    def denoise(x, sigma):
        t = float(np.interp(math.log(sigma), logs, np.arange(len(logs))))
        return x - sigma * network(x / math.sqrt(1 + sigma**2), t)

    return denoise


def karras_sampler(denoise, levels, z, churn, low, high, s_noise, heun):
    """Algorithm 2; `z(i)` is the noise of step i; returns the sample. Without `heun`, lines 7 to 9 are left out."""
    steps = len(levels)
    t = [*levels, 0.0]
    x = t[0] * z(-1)
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * z(i)
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if heun and t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * 0.5 * (d + d_next)
    return x


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("process", [edm(), discrete()], ids=lambda p: p.kind)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"churn": 8.0},
        {"churn": 80.0, "churn_min": 0.05, "churn_max": 20.0, "churn_noise": 1.007},
        {"churn": 3.0, "churn_max": 1.0},
    ],
)
@pytest.mark.parametrize("network", [analytic, Fixed])
def test_edm_sampler(network, options, process, name):
    steps, rho = 12, 7
    high, low = process.highest.ratio, process.lowest.ratio
    levels = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)
    ]
    trajectory = solve(name, process, steps, grid="karras", **options)
    stride = 2 if name == "heun" else 1
    assert len(trajectory.coef) == stride * (steps - 1) + 1
    bounds = options.get("churn_min", 0.0), options.get("churn_max", math.inf)
    s_noise, churn = options.get("churn_noise", 1.0), options.get("churn", 0.0)

    # The noise of step i + 1 goes in with the last evaluation of step i, that of step 0 into the initial state.
    z = noises(steps + 2)
    gamma = min(churn / steps, math.sqrt(2) - 1) if bounds[0] <= levels[0] <= bounds[1] else 0.0
    first = levels[0] * z(-1) + levels[0] * math.sqrt((1 + gamma) ** 2 - 1) * s_noise * z(0)
    spread = levels[0] * math.sqrt(1 + s_noise**2 * ((1 + gamma) ** 2 - 1))
    alpha = 1.0 if process.kind == "edm" else 1.0 / math.sqrt(1 + ((1 + gamma) * levels[0]) ** 2)
    assert math.isclose(trajectory.scale, alpha * spread, rel_tol=1e-12)
    got = run(trajectory, network(process), alpha * first, lambda e: z((e + stride) // stride))[-1]
    model = denoiser(process, network(process))
    near(got, karras_sampler(model, levels, z, churn, *bounds, s_noise, name == "heun"))


@pytest.mark.parametrize("steps", [50, 200])
@pytest.mark.parametrize("network", [analytic, Fixed])
def test_euler_maruyama_on_the_linear_sde(network, steps):
    """dx = [-beta x / 2 - beta score] dt + sqrt(beta) dw, backwards (Song et al., 2021, equation 6)."""
    process, z = vpsde(), noises(steps + 1)
    model, x = network(process), z(-1)
    dt = 1.0 / steps
    for i in range(steps):
        t = 1.0 - i * dt
        beta = 0.1 + t * 19.9
        sigma = math.sqrt(1.0 - math.exp(-(0.1 * t + 0.5 * 19.9 * t * t)))
        score = -model(x, 999.0 * t) / sigma
        mean = x - (-0.5 * beta * x - beta * score) * dt
        x = mean + math.sqrt(beta * dt) * z(i) if i < steps - 1 else mean
    near(run(solve("euler_maruyama", process, steps), model, z(-1), z)[-1], x)


def test_euler_maruyama_caps_the_noise_rate_where_the_cosine_process_has_none():
    trajectory = solve("euler_maruyama", cosine(), 50)
    assert trajectory.coef[:, INDEX["a_n"]].max() == pytest.approx(math.sqrt(0.999))
