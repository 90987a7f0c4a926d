"""DDIM(eta): Song et al. (ICLR 2021, arXiv 2010.02502), equations 12 and 16."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import DATA, Point, Process
from models.solvers.grids import Route, path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble
from models.solvers.vp import Discrete


@solver("cosine vpsde discrete", eta=())
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """x' = alpha' m + sqrt(sigma'^2 - s^2) e + s z, with the noise estimate e of the output before any clipping."""
    route = path(process, steps, options, "index")
    evaluations = []
    for here, there in zip(route.points[:-1], destinations(process, route), strict=True):
        s = (options.eta or 0.0) * math.sqrt(posterior_variance(here, there))
        d = math.sqrt(max(0.0, there.sigma**2 - s**2))
        n_x, n_o = process.noise(here)
        evaluations.append((here, {"a_m": there.alpha, "a_y": d * n_x, "a_o": d * n_o, "a_n": s}))
    return assemble(process, evaluations, route.scale)


def destinations(process: Process, route: Route) -> list[Point]:
    """Where each step goes: on trained times timesteps // steps further, as diffusers does, not to the next entry."""
    if not isinstance(process, Discrete):
        return list(route.points[1:])
    stride = process.timesteps // (len(route.points) - 1)
    end = DATA if process.final_alpha == "one" else process.lowest
    return [process.at_index(t) if (t := int(p.t) - stride) >= 0 else end for p in route.points[:-1]]


def posterior_variance(here: Point, there: Point) -> float:
    """Variance of x' given x and x0: (1 - A') / (1 - A) (1 - A / A'), with A = alpha^2."""
    return (there.sigma / here.sigma) ** 2 * (1.0 - (here.alpha / there.alpha) ** 2)
