"""The rectified-flow process: straight lines from data to noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.api import UserError
from models.solvers.base import Coefficients, Point, Prediction, Process


@dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """Rectified flow (Liu et al., ICLR 2023): alpha = 1 - sigma, network predicts e - x0, network time
    `timesteps` x sigma; `shift` moves grids towards noise (Esser et al., ICML 2024, equation 23)."""

    kind = "flow"
    predictions = ("flow",)
    prediction: Prediction = "flow"
    timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps < 2:
            raise UserError(f"process.timesteps: must be at least 2, got {self.timesteps}")
        if self.shift <= 0.0:
            raise UserError(f"process.shift: must be above 0, got {self.shift}")

    def at(self, sigma: float) -> Point:
        """The point with this sigma."""
        return Point(self.timesteps * sigma, sigma, 1.0 - sigma, sigma)

    def shifted(self, sigma: float) -> float:
        """shift sigma / (1 + (shift - 1) sigma)."""
        return self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)

    @property
    def lowest(self) -> Point:
        """1 / timesteps, shifted twice: once where diffusers makes the table and once where it makes the grid."""
        return self.at(self.shifted(self.shifted(1.0 / self.timesteps)))

    @property
    def highest(self) -> Point:
        """One trained time below pure noise, where alpha is not 0."""
        return self.at(1.0 - 1.0 / self.timesteps)

    def at_ratio(self, ratio: float) -> Point:
        """sigma = ratio / (1 + ratio)."""
        return self.at(ratio / (1.0 + ratio))

    def denoise(self, p: Point) -> Coefficients:
        """m = x - sigma o."""
        return {"t": p.t, "c_x": 1.0, "c_o": -p.sigma, "clip": math.inf if self.clip is None else self.clip}

    def noise(self, p: Point) -> tuple[float, float]:
        """e = x + alpha o."""
        return 1.0, p.alpha

    def slope(self, p: Point) -> tuple[float, float, float, float]:
        """dx / d sigma = (x - m) / sigma."""
        return p.sigma, 1.0, 1.0 / p.sigma, -1.0 / p.sigma
