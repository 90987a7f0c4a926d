"""UniPC, multistep, data prediction: UniP-2 and UniC-2 of Zhao et al. (NeurIPS 2023, arXiv 2302.04867)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from models.api import SolverOptions
from models.solvers.base import Coefficients, Point, Process
from models.solvers.grids import path
from models.solvers.options import SolverError, solver
from models.solvers.table import Trajectory, assemble, transfer


@solver("cosine vpsde discrete edm flow", form=("bh2", "bh1"), corrector=(), final_sigma=(), lower_order_final=())
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """Each row corrects the state that the row before predicted (y), then predicts the next one from it."""
    form = options.form or "bh2"
    if form == "bh1":
        if options.final_sigma == "zero":
            message = "bh1 divides by the last step in log-SNR, infinite at zero noise; use sigma_min, or form bh2"
            raise SolverError(message, "solver_options.final_sigma")
        options = replace(options, final_sigma="sigma_min")
    if options.lower_order_final is False and options.final_sigma != "sigma_min":
        message = "a last step of second order cannot end at zero noise; set final_sigma to sigma_min"
        raise SolverError(message, "solver_options.lower_order_final")
    route = path(process, steps, options, "multistep")
    points = route.points
    if form == "bh1" and points[0].alpha == 0.0:
        message = "bh1 divides by the first step in log-SNR, infinite where this grid starts; use grid logsnr, or bh2"
        raise SolverError(message, "solver_options.form")
    evaluations = []
    before = 1  # order of the step before
    for i, (here, there) in enumerate(route.steps()):
        order = min(2, i + 1, steps - i if options.lower_order_final is not False else 2)
        row = predictor(points[i - 1 : i + 2] if order == 2 else (here, there), form)
        if i > 0 and options.corrector is not False:
            row |= corrector(points[i - 2 : i + 1] if before == 2 else points[i - 1 : i + 1], form)
        evaluations.append((here, row))
        before = order
    return assemble(process, evaluations, route.scale)


def phi(h: float, form: str) -> tuple[float, float]:
    """(expm1(-h), B(h)): B is expm1(-h) itself (bh2) or -h (bh1)."""
    first = math.expm1(-h)
    return first, first if form == "bh2" else -h


def predictor(points: Sequence[Point], form: str) -> Coefficients:
    """From the last but one point to the last; first order with two points, second with three."""
    *history, here, there = points
    row = transfer(here, there)
    if history:
        h = there.log_snr - here.log_snr
        slope = 0.5 * there.alpha * phi(h, form)[1] * h / (history[0].log_snr - here.log_snr)
        row |= {"a_m": row["a_m"] + slope, "a_1": -slope}
    return row


def corrector(points: Sequence[Point], form: str) -> Coefficients:
    """y at the last point, from s at the last but one and the estimates m (here), h1 and h2 (before)."""
    *history, start, here = points
    h = here.log_snr - start.log_snr
    first, b = phi(h, form)
    rho1, rho2, r = 0.0, 0.5, 1.0
    if history:
        r = (history[0].log_snr - start.log_snr) / h
        f2 = -first / h - 1.0
        f3 = -f2 / h - 0.5
        rho1 = (2.0 * f3 - f2) / b / (r - 1.0)
        rho2 = f2 / b - rho1
    return {
        "k_x": 0.0,
        "k_s": here.sigma / start.sigma,
        "k_m": -here.alpha * b * rho2,
        "k_1": -here.alpha * (first - b * (rho1 / r + rho2)),
        "k_2": -here.alpha * b * rho1 / r,
    }
