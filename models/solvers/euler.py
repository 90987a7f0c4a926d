"""Euler's method on the probability-flow ODE: Karras et al. (NeurIPS 2022), algorithm 2 without its correction.

In sigma / alpha, the noise level, and equally on the straight lines of a flow, a step keeps the estimate and the
noise that the network sees: on a variance-preserving process it is DDIM's.
"""

from __future__ import annotations

from models.api import SolverOptions
from models.solvers.base import Process
from models.solvers.churn import PARTS, churned, fold
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble, transfer


@solver("cosine vpsde discrete edm flow", **PARTS)
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) m, from the churned point of each step."""
    route = path(process, steps, options, "level")
    hats = churned(process, route, options)
    rows = [transfer(hat, there) for hat, there in zip(hats, route.points[1:], strict=True)]
    scale = fold(route, hats, options, rows)
    return assemble(process, list(zip(hats, rows, strict=True)), scale)
