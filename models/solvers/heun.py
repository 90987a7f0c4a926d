"""Heun's method on the probability-flow ODE: Karras et al. (NeurIPS 2022), algorithms 1 and 2; 2 steps - 1
evaluations, as the last step is Euler's."""

from __future__ import annotations

from models.api import SolverOptions
from models.solvers.base import Coefficients, Point, Process
from models.solvers.churn import PARTS, churned, fold
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble, transfer


@solver("cosine vpsde discrete edm flow", **PARTS)
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """An Euler row at the start of each step, a corrector row at its end; both slopes averaged."""
    route = path(process, steps, options, "level")
    hats = churned(process, route, options)
    pairs = list(zip(hats, route.points[1:], strict=True))
    halves = straight if process.prediction == "flow" and process.clip is None else curved
    rows = [halves(process, here, there) for here, there in pairs[:-1]]
    last = transfer(*pairs[-1])
    scale = fold(route, hats, options, [*(corrector for _, corrector in rows), last])
    evaluations = []
    for (here, there), (euler, corrector) in zip(pairs[:-1], rows, strict=True):
        evaluations += [(here, euler), (there, corrector)]
    return assemble(process, [*evaluations, (hats[-1], last)], scale)


def curved(process: Process, here: Point, there: Point) -> tuple[Coefficients, Coefficients]:
    """x'/c' = s/c + (tau' - tau) (slope + slope') / 2: s the state and h1 the estimate at the start of the step."""
    tau, c, a, b = process.slope(here)
    tau_next, c_next, a_next, b_next = process.slope(there)
    half = 0.5 * (tau_next - tau)
    corrector = {
        "a_s": c_next / c * (1.0 + half * a),
        "a_1": c_next * half * b,
        "a_y": half * a_next,
        "a_m": c_next * half * b_next,
    }
    return transfer(here, there), corrector


def straight(process: Process, here: Point, there: Point) -> tuple[Coefficients, Coefficients]:
    """The same where the network predicts the slope: m and h1 are slopes, which (x - m) / sigma would round."""
    step = there.sigma - here.sigma
    output = {"c_x": 0.0, "c_o": 1.0}
    return output | {"a_y": 1.0, "a_m": step}, output | {"a_y": 0.0, "a_s": 1.0, "a_1": 0.5 * step, "a_m": 0.5 * step}
