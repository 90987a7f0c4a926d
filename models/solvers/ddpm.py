"""DDPM ancestral sampling: Ho et al. (NeurIPS 2020), equations 6 and 7; learned variance: Nichol & Dhariwal
(ICML 2021), equation 15."""

from __future__ import annotations

import math

from models.api import SolverOptions
from models.solvers.base import Coefficients, Point, Process
from models.solvers.ddim import posterior_variance
from models.solvers.grids import path
from models.solvers.options import SolverError, solver
from models.solvers.table import Trajectory, assemble
from models.solvers.vp import Discrete


@solver("cosine vpsde discrete", variance=("fixed_small", "fixed_large", "learned_range"))
def trajectory(process: Process, steps: int, options: SolverOptions) -> Trajectory:
    """Posterior mean and noise between visited times; no noise on the last step, whatever its time (diffusers adds
    some unless it is trained time 0)."""
    learned = isinstance(process, Discrete) and process.learned_variance
    variance = options.variance or ("learned_range" if learned else "fixed_small")
    if variance == "learned_range" and not learned:
        raise SolverError(
            "the model has no learned variance; use fixed_small or fixed_large", "solver_options.variance"
        )
    route = path(process, steps, options, "index")
    evaluations = [(here, mean(here, there) | noise(here, there, variance)) for here, there in route.steps()]
    return assemble(process, evaluations, route.scale)


def mean(here: Point, there: Point) -> Coefficients:
    """Coefficients of m and x in the posterior mean."""
    b = 1.0 - (here.alpha / there.alpha) ** 2
    return {
        "a_m": there.alpha * b / here.sigma**2,
        "a_y": here.alpha / there.alpha * (there.sigma / here.sigma) ** 2,
    }


def noise(here: Point, there: Point, variance: str) -> Coefficients:
    """Noise scale, or the two ends of the learned log-variance."""
    if there.sigma == 0.0:
        return {}
    small, large = posterior_variance(here, there), 1.0 - (here.alpha / there.alpha) ** 2
    if variance == "learned_range":
        return {"a_n": 1.0, "lv0": math.log(small), "lv1": math.log(large)}
    return {"a_n": math.sqrt(small if variance == "fixed_small" else large)}
