"""DPM-Solver++(2M): Lu et al. (2022, arXiv 2211.01095), algorithm 2."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Coefficients, Process
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble, transfer

OPTIONS: dict[str, tuple[object, ...]] = {
    "form": ("midpoint", "heun"),
    "final_sigma": (),
    "lower_order_final": (),
}
FEW = 15  # runs shorter than this end with a first-order step, wherever they end (diffusers)


@solver("cosine vpsde discrete edm flow", **OPTIONS)
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """Two-step multistep on the denoised estimate, exponential in lambda = ln(alpha / sigma)."""
    route = path(process, steps, options, "multistep")
    evaluations = []
    for i, (here, there) in enumerate(route.steps()):
        row = transfer(here, there)
        if i > 0 and not last_is_first_order(i, steps, options):
            h = there.log_snr - here.log_snr
            half = 0.5 * row["a_m"] if options.form != "heun" else there.alpha * (math.expm1(-h) / h + 1.0)
            row |= second_order(row["a_m"], half, here.log_snr - route.points[i - 1].log_snr, h)
        evaluations.append((here, row))
    return assemble(process, evaluations, route.scale)


def last_is_first_order(i: int, steps: int, options: SolverOptions) -> bool:
    """Whether step `i` is the last and of first order: always on the way to zero noise."""
    few = options.lower_order_final is not False and steps < FEW
    return i == steps - 1 and (few or options.final_sigma != "sigma_min")


def second_order(p: float, q: float, h_before: float, h: float) -> Coefficients:
    """p m + q (m - h1) / r, with r the ratio of the step before to this one."""
    return {"a_m": p + q * h / h_before, "a_1": -q * h / h_before}
