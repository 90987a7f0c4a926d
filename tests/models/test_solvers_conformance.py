"""Every solver against diffusers' step loops: the same network, start and noise, the same final state.

Where diffusers departs from the publication and the product does not follow, a comment says so.
"""

import itertools

import pytest
import torch

from models.solvers.vp import TERMINAL
from tests.models import diffusers_loops as theirs
from tests.models.solving import LINEAR, SCALED, SQUARED, Fixed, discrete, edm, exact_output, flow, run, solve

ODE, STOCHASTIC, LONG = 2e-6, 2e-6, 2e-5
TIMES = ("linspace", "leading", "trailing")
SHAPE = (16, 1, 2, 2)


def noises(count):
    """Start and per-evaluation noise, float64; none on the last."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count + 1, *SHAPE, generator=generator, dtype=torch.float64)
    z[-1] = 0
    return z[0], lambda e: z[e + 1]


def analytic(process):
    """The perfect network of the analytic model, as a function of its input and time."""
    def network(x, t):
        if process.kind == "discrete":
            point = process.at_index(round(t)) if float(t).is_integer() else None
            if point is None or process.alpha_bar[round(t)] == 0.0:
                import numpy as np
                point = process.at_level(t, float(np.interp(t, np.arange(process.timesteps), process.ratios)))
            c_in = 1.0
        return exact_output(process, point, x)
    return network
