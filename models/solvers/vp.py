"""Variance-preserving processes, alpha^2 + sigma^2 = 1: cosine, linear SDE, and a table of trained times."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.api import GridName, UserError
from models.solvers.base import Point, Prediction, Process
from models.solvers.betas import alpha_bars

EDGE = 1e-3  # diffusion time nearest to an end at which a continuous process has a usable log-SNR
TERMINAL = 2.0**-24  # alpha_bar that stands for zero where a finite sigma / alpha is needed (diffusers)


@dataclass(frozen=True, kw_only=True)
class Continuous(Process):
    """Variance preserving, continuous in u."""

    @abstractmethod
    def at(self, u: float) -> Point:
        """The point at diffusion time u."""

    @abstractmethod
    def beta(self, u: float) -> float:
        """-d ln(alpha^2) / du: squared noise rate of the forward SDE."""

    @property
    def lowest(self) -> Point:
        """u = EDGE."""
        return self.at(EDGE)


@dataclass(frozen=True, kw_only=True)
class Cosine(Continuous):
    """alpha = cos(pi u / 2), sigma = sin(pi u / 2), exactly 0 at the ends; network time u."""

    kind = "cosine"
    predictions = ("v", "sample")  # an epsilon says nothing of the data at u = 1, where alpha is 0
    prediction: Prediction = "v"

    def at(self, u: float) -> Point:
        """The point at diffusion time u."""
        alpha = 0.0 if u >= 1.0 else math.cos(0.5 * math.pi * u)
        return Point(u, u, alpha, 0.0 if u <= 0.0 else math.sin(0.5 * math.pi * u))

    def beta(self, u: float) -> float:
        """pi tan(pi u / 2)."""
        return math.pi * math.tan(0.5 * math.pi * u) if u < 1.0 else math.inf

    @property
    def highest(self) -> Point:
        """u = 1 - EDGE."""
        return self.at(1.0 - EDGE)

    def at_ratio(self, ratio: float) -> Point:
        """u = 2 atan(sigma / alpha) / pi."""
        return self.at(2.0 / math.pi * math.atan(ratio))

    def slope(self, p: Point) -> tuple[float, float, float, float]:
        """dx/d(angle) = alpha e - sigma m, finite at u = 1 as well (Salimans & Ho, ICLR 2022, appendix D)."""
        return 0.5 * math.pi * p.u, 1.0, p.alpha / p.sigma, -1.0 / p.sigma


@dataclass(frozen=True, kw_only=True)
class VPSDE(Continuous):
    """Linear beta(u) (Song et al., ICLR 2021, appendix B); network time 999 u, as U-ViT has it."""

    kind = "vpsde"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.beta_min < self.beta_max:
            raise UserError(f"process.beta_min: must be above 0 and below beta_max, got {self.beta_min}")

    def at(self, u: float) -> Point:
        """The point at diffusion time u."""
        integral = u * (self.beta_min + 0.5 * u * (self.beta_max - self.beta_min))
        return Point(999.0 * u, u, math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral)))

    def beta(self, u: float) -> float:
        """beta_min + u (beta_max - beta_min)."""
        return self.beta_min + u * (self.beta_max - self.beta_min)

    @property
    def highest(self) -> Point:
        """u = 1."""
        return self.at(1.0)

    def at_ratio(self, ratio: float) -> Point:
        """The u whose integral of beta is ln(1 + ratio^2)."""
        integral = math.log1p(ratio * ratio)
        root = math.sqrt(self.beta_min**2 + 2.0 * (self.beta_max - self.beta_min) * integral)
        return self.at(min(1.0, 2.0 * integral / (root + self.beta_min)))


@dataclass(frozen=True, kw_only=True)
class Discrete(Process):
    """Variance preserving over `timesteps` trained times (Ho et al., 2020); network time 0..timesteps - 1."""

    kind = "discrete"
    betas: Mapping[str, Any]
    timesteps: int = 1000
    learned_variance: bool = False
    zero_terminal_snr: bool = False
    steps_offset: int = 0
    final_alpha: Literal["one", "first"] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError("process.prediction: epsilon says nothing at zero terminal SNR; such models predict v")
        if self.timesteps < 2:
            raise UserError(f"process.timesteps: must be at least 2, got {self.timesteps}")
        if self.steps_offset < 0:
            raise UserError(f"process.steps_offset: must be at least 0, got {self.steps_offset}")
        self.alpha_bar  # noqa: B018  # computed now, so that a bad table is refused when it is read

    @cached_property
    def alpha_bar(self) -> NDArray[np.float64]:
        """Cumulative products of 1 - beta (timesteps,)."""
        return alpha_bars(self.timesteps, self.betas, self.zero_terminal_snr)

    @cached_property
    def ratios(self) -> NDArray[np.float64]:
        """sigma / alpha of every time (timesteps,), finite and never falling: zero terminal SNR is TERMINAL here."""
        squares = np.maximum(self.alpha_bar, TERMINAL) if self.zero_terminal_snr else self.alpha_bar
        return np.sqrt((1.0 - squares) / squares)

    def at_index(self, t: int) -> Point:
        """The point of a trained time, exactly."""
        square = float(self.alpha_bar[t])
        return Point(float(t), t / self.timesteps, math.sqrt(square), math.sqrt(1.0 - square))

    def at_level(self, t: float, ratio: float) -> Point:
        """The point at network time t with this sigma / alpha."""
        alpha = 1.0 / math.hypot(1.0, ratio)
        return Point(t, t / self.timesteps, alpha, ratio * alpha)

    @property
    def lowest(self) -> Point:
        """t = 0."""
        return self.at_index(0)

    @property
    def highest(self) -> Point:
        """The last trained time."""
        return self.at_level(self.timesteps - 1.0, float(self.ratios[-1]))

    def at_ratio(self, ratio: float) -> Point:
        """Network time by interpolation in ln(sigma / alpha), within the trained times."""
        logs = np.log(self.ratios)
        return self.at_level(float(np.interp(math.log(ratio), logs, np.arange(self.timesteps))), ratio)

    def initial(self, first: Point, grid: GridName, by_level: bool) -> float:
        """diffusers: 1, but sigma of the first point for Euler and Heun unless the grid is `leading`."""
        return first.sigma if by_level and grid != "leading" else 1.0
