"""Ancestral sampling by noise level: Song et al. (ICLR 2021, arXiv 2011.13456), appendix F; k-diffusion's ancestral
Euler. Down to less noise than asked, then up again by fresh noise."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Process
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble


@solver("cosine vpsde discrete edm flow")
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """With q the ratio of noise levels: down to sigma' q, up by sigma' sqrt(1 - q^2)."""
    route = path(process, steps, options, "level")
    evaluations = []
    for here, there in route.steps():
        q = there.ratio / here.ratio
        row = {
            "a_y": q * there.sigma / here.sigma,
            "a_m": there.alpha * (1.0 - q * q),
            "a_n": there.sigma * math.sqrt(1.0 - q * q),
        }
        evaluations.append((here, row))
    return assemble(process, evaluations, route.scale)
