"""Churn: noise added before a step and removed by it (Karras et al., NeurIPS 2022, algorithm 2).

The noise of a step is folded into the evaluation before it, and that of the first step into the initial state, so
that the network always sees the churned state. (diffusers' EulerDiscrete evaluates before it churns.)
"""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Coefficients, Point, Process
from models.solvers.flow import Flow
from models.solvers.grids import Route
from models.solvers.options import SolverError

OUTPUTS = ("a_y", "a_o", "a_m", "a_1", "a_2", "a_s")
PARTS: dict[str, tuple[object, ...]] = {"churn": (), "churn_min": (), "churn_max": (), "churn_noise": ()}


def churned(process: Process, route: Route, options: SolverOptions) -> list[Point]:
    """The point that each step starts from: its own, or one with more noise, (1 + gamma) times its level."""
    if not options.churn:
        for name in options.given():
            if name in PARTS and name != "churn":
                raise SolverError(f"{name} has no effect without churn above 0", f"solver_options.{name}")
        return list(route.points[:-1])
    if isinstance(process, Flow):
        message = "churn raises the noise at constant signal, which a flow does not have; leave it out"
        raise SolverError(message, "solver_options.churn")
    gamma = min(options.churn / (len(route.points) - 1), math.sqrt(2.0) - 1.0)
    low, high = options.churn_min or 0.0, math.inf if options.churn_max is None else options.churn_max
    if low > high:
        raise SolverError(f"churn_min {low} is above churn_max {high}", "solver_options.churn_min")
    return [
        process.at_ratio(p.ratio * (1.0 + gamma)) if low <= p.ratio <= high and p.alpha > 0.0 else p
        for p in route.points[:-1]
    ]


def rise(here: Point, hat: Point, options: SolverOptions) -> tuple[float, float]:
    """(f, n): the churned state is f x + n z."""
    if hat is here:
        return 1.0, 0.0
    f = hat.alpha / here.alpha
    scale = 1.0 if options.churn_noise is None else options.churn_noise
    return f, scale * math.sqrt(max(0.0, hat.sigma**2 - (f * here.sigma) ** 2))


def fold(route: Route, hats: list[Point], options: SolverOptions, ends: list[Coefficients]) -> float:
    """Fold each step's churn into `ends`, the last row of every step (no noise yet), in place: the initial scale."""
    rises = [rise(here, hat, options) for here, hat in zip(route.points[:-1], hats, strict=True)]
    for row, (f, n) in zip(ends[:-1], rises[1:], strict=True):
        for name in OUTPUTS:
            row[name] = f * row.get(name, 0.0)
        row["a_n"] = n
    f, n = rises[0]
    return math.hypot(f * route.scale, n)
