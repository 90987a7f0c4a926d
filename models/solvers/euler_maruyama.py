"""Euler-Maruyama on the reverse SDE of Song et al. (ICLR 2021, arXiv 2011.13456), equation 6."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Process
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble
from models.solvers.vp import Continuous

CAP = 0.999  # largest beta du: Nichol & Dhariwal (2021) cap their betas so, for the cosine process ends at infinity


@solver("cosine vpsde")
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """x' = (1 + beta du / 2) x - (beta du / sigma) e + sqrt(beta du) z, without noise on the last step."""
    assert isinstance(process, Continuous)
    route = path(process, steps, options, "level")
    evaluations = []
    for here, there in route.steps():
        b = min(CAP, process.beta(here.u) * (here.u - there.u))
        n_x, n_o = (n * -b / here.sigma for n in process.noise(here))
        noise = math.sqrt(b) if there.sigma > 0.0 else 0.0
        evaluations.append((here, {"a_y": 1.0 + 0.5 * b + n_x, "a_o": n_o, "a_n": noise}))
    return assemble(process, evaluations, route.scale)
