"""The EDM process: noise level as time, a preconditioned network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from models.api import GridName, UserError
from models.solvers.base import Coefficients, Point, Process


@dataclass(frozen=True, kw_only=True)
class EDM(Process):
    """Karras et al. (NeurIPS 2022): alpha = 1, preconditioned network, network time ln(sigma) / 4.

    u is the quantile of sigma under the training noise, log-normal (p_mean, p_std). `prediction` gives the sign of
    the network output: epsilon as published, v for its negative.
    """

    kind = "edm"
    predictions = ("epsilon", "v")
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise UserError(f"process.sigma_min: must be above 0 and below sigma_max, got {self.sigma_min}")
        for name in ("sigma_data", "rho", "p_std"):
            if getattr(self, name) <= 0.0:
                raise UserError(f"process.{name}: must be above 0, got {getattr(self, name)}")

    @property
    def lowest(self) -> Point:
        """sigma_min."""
        return self.at_ratio(self.sigma_min)

    @property
    def highest(self) -> Point:
        """sigma_max."""
        return self.at_ratio(self.sigma_max)

    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma."""
        log = math.log(ratio)
        return Point(0.25 * log, NormalDist(self.p_mean, self.p_std).cdf(log), 1.0, ratio)

    def initial(self, first: Point, grid: GridName, by_level: bool) -> float:
        """sigma of the first point, as published (diffusers: sqrt(sigma_max^2 + 1))."""
        return first.sigma

    def denoise(self, p: Point) -> Coefficients:
        """c_in, c_skip and c_out of table 1."""
        total = math.hypot(p.sigma, self.sigma_data)
        c_out = p.sigma * self.sigma_data / total
        return {
            "t": p.t,
            "c_in": 1.0 / total,
            "c_x": (self.sigma_data / total) ** 2,
            "c_o": c_out if self.prediction == "epsilon" else -c_out,
            "clip": math.inf if self.clip is None else self.clip,
        }
