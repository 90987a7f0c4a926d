"""SDE-DPM-Solver++(2M): Lu et al. (2022, arXiv 2211.01095), midpoint form; the Heun form is diffusers'."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Coefficients, Process
from models.solvers.dpmpp_2m import OPTIONS, last_is_first_order, second_order
from models.solvers.grids import path
from models.solvers.options import solver
from models.solvers.table import Trajectory, assemble


@solver("cosine vpsde discrete edm flow", **OPTIONS)
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """DPM-Solver++(2M) for the reverse SDE: half the log-SNR of each step is passed as fresh noise."""
    route = path(process, steps, options, "multistep")
    evaluations = []
    for i, (here, there) in enumerate(route.steps()):
        h = there.log_snr - here.log_snr
        gain = -math.expm1(-2.0 * h)
        row: Coefficients = {
            "a_y": there.sigma / here.sigma * math.exp(-h),
            "a_m": there.alpha * gain,
            "a_n": there.sigma * math.sqrt(gain),
        }
        if i > 0 and not last_is_first_order(i, steps, options):
            half = 0.5 * row["a_m"] if options.form != "heun" else there.alpha * (1.0 - gain / (2.0 * h))
            row |= second_order(row["a_m"], half, here.log_snr - route.points[i - 1].log_snr, h)
        evaluations.append((here, row))
    return assemble(process, evaluations, route.scale)
