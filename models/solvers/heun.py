"""Heun's method on the probability-flow ODE: Karras et al. (NeurIPS 2022), algorithms 1 and 2; 2 steps - 1
evaluations, as the last step is Euler's."""

from __future__ import annotations

from models.api import SolverOptions
from models.solvers.base import Point, Process, Row
from models.solvers.churn import PARTS, churned, fold
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble, transfer


@solver("cosine vpsde discrete edm flow", **PARTS)
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """An Euler row at the start of each step, a corrector row at its end; both slopes averaged."""
    route = path(process, steps, options, "level")
    hats = churned(process, route, options)
    firsts = [transfer(hat, there) for hat, there in zip(hats, route.points[1:], strict=True)]
    seconds = [average(process, hat, there) for hat, there in zip(hats[:-1], route.points[1:-1], strict=True)]
    scale = fold(route, hats, options, [*seconds, firsts[-1]])
    evaluations = []
    for hat, there, first, second in zip(hats, route.points[1:], firsts, seconds, strict=False):
        evaluations += [(hat, first), (there, second)]
    return assemble(process, [*evaluations, (hats[-1], firsts[-1])], scale)


def average(process: Process, here: Point, there: Point) -> Row:
    """x'/c' = s/c + (tau' - tau) (slope + slope') / 2: s the state and h1 the estimate at the start of the step."""
    tau, c, a, b = process.slope(here)
    tau_next, c_next, a_next, b_next = process.slope(there)
    half = 0.5 * (tau_next - tau)
    return {
        "a_s": c_next / c * (1.0 + half * a),
        "a_1": c_next * half * b,
        "a_y": half * a_next,
        "a_m": c_next * half * b_next,
    }
