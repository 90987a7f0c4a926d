"""Run a trajectory through the kernel on a stand-in network, and the analytic model whose outputs are exact."""

import math

import numpy as np
import torch

from models.api import SolverOptions
from models.registry import SOLVERS, resolve
from models.solvers.kernel import update
from models.solvers.process import from_config
from models.solvers.table import INDEX

MEAN, STD = 0.3, 0.5

LINEAR = {"schedule": "linear", "start": 1e-4, "end": 0.02}
SCALED = {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012}
SQUARED = {"schedule": "squaredcos_cap_v2"}


def discrete(prediction="epsilon", betas=LINEAR, **more):
    return from_config({"kind": "discrete", "timesteps": 1000, "betas": betas, "prediction": prediction, **more})


def cosine(prediction="v", **more):
    return from_config({"kind": "cosine", "prediction": prediction, **more})


def vpsde(prediction="epsilon", **more):
    return from_config({"kind": "vpsde", "prediction": prediction, **more})


def edm(prediction="epsilon", **more):
    return from_config({"kind": "edm", "prediction": prediction, **more})


def flow(**more):
    return from_config({"kind": "flow", **more})


PROCESSES = {
    "cosine-v": cosine(),
    "cosine-v-clip": cosine(clip=1.0),
    "cosine-sample": cosine("sample"),
    "vpsde-epsilon": vpsde(),
    "vpsde-v": vpsde("v"),
    "discrete-epsilon": discrete(),
    "discrete-v": discrete("v", SCALED),
    "discrete-sample": discrete("sample", SQUARED),
    "discrete-zero-snr": discrete("v", SCALED, zero_terminal_snr=True),
    "discrete-learned": discrete(learned_variance=True),
    "edm-epsilon": edm(),
    "edm-v": edm("v"),
    "flow": flow(),
    "flow-shift": flow(shift=3.0),
}


def solve(name, process, steps, **options):
    """The trajectory of a registered solver."""
    return resolve(SOLVERS, name)(process, steps, SolverOptions(**options))


def run(trajectory, network, x, noise=None, variance=None):
    """Sampling: `network(scaled state, time)`, `noise(evaluation)`; the state after every evaluation.

    In the precision of `x`; `variance(evaluation)` is the learned one.
    """
    s, h1, h2 = (torch.zeros_like(x) for _ in range(3))
    states = []
    for e, row in enumerate(torch.from_numpy(trajectory.coef)):
        coef = row.to(x.dtype).expand(len(x), -1)
        o = network(row[INDEX["c_in"]].to(x.dtype) * x, row[INDEX["t"]].item())
        z = torch.zeros_like(x) if noise is None or row[INDEX["a_n"]] == 0 else noise(e).to(x.dtype)
        x, s, h1, h2 = update(coef, x, s, h1, h2, o, z, None if variance is None else variance(e).to(x.dtype))
        states.append(x)
    return states


def exact_output(process, point, x):
    """What a perfect network answers for data N(MEAN, STD^2) at a point, from the unscaled state x."""
    alpha, sigma = point.alpha, point.sigma
    spread = alpha**2 * STD**2 + sigma**2
    x0 = MEAN + alpha * STD**2 / spread * (x - alpha * MEAN)
    e = sigma / spread * (x - alpha * MEAN)
    if process.kind == "edm":
        row = process.denoise(point)
        return (x0 - row["c_x"] * x) / row["c_o"]
    return {"epsilon": e, "sample": x0, "v": alpha * e - sigma * x0, "flow": e - x0}[process.prediction]


def exact_state(point, quantile):
    """Where the probability-flow ODE has the state of this standard-normal quantile, at a point."""
    return point.alpha * MEAN + math.hypot(point.alpha * STD, point.sigma) * quantile


def analytic(process):
    """The perfect network, told its scaled input and its time only."""

    def network(x, t):
        point, c_in = at_time(process, t), 1.0
        if process.kind == "edm":
            c_in = process.denoise(point)["c_in"]
        return exact_output(process, point, x.double() / c_in).to(x.dtype)

    return network


def at_time(process, t):
    """The point that a network time stands for."""
    if process.kind == "discrete":
        return process.at_level(t, float(np.interp(t, np.arange(process.timesteps), process.ratios)))
    if process.kind == "edm":
        return process.at_ratio(math.exp(4 * t))
    return process.at(t / (process.timesteps if process.kind == "flow" else {"cosine": 1, "vpsde": 999}[process.kind]))


class Fixed(torch.nn.Module):
    """A small random network of state and time, float64, the same everywhere."""

    def __init__(self, process):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(8, 6, generator=generator, dtype=torch.float64) / 3
        self.second = torch.randn(6, 4, generator=generator, dtype=torch.float64) / 3
        self.horizon = {"discrete": 1000, "vpsde": 999, "flow": 1000}.get(process.kind, 1)

    def forward(self, x, t):
        """(N, 1, 2, 2) at time t -> (N, 1, 2, 2)."""
        s = t / self.horizon
        features = torch.tensor([math.sin(3 * s), math.cos(3 * s), s, 1.0], dtype=torch.float64)
        flat = torch.cat([x.double().flatten(1), features.expand(len(x), -1)], 1)
        return (torch.tanh(flat @ self.first) @ self.second + 0.5 * flat[:, :4]).view(x.shape).to(x.dtype)


def start(n=64):
    """Quantiles (n, 1, 1, 1), float64."""
    return torch.linspace(-2, 2, n, dtype=torch.float64).view(n, 1, 1, 1)
