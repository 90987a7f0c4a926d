"""A diffusion process x = alpha x0 + sigma e, e ~ N(0, I): its points, and what its network predicts.

Every process maps its own time to a `Point`; grids.py chooses the points, solvers fill rows between them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from models.api import GridName, UserError

Prediction = Literal["epsilon", "v", "sample", "flow"]
Coefficients = dict[str, float]


@dataclass(frozen=True)
class Point:
    """A time of a process: network time `t`, diffusion time `u` in [0, 1], signal and noise scales."""

    t: float
    u: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level that Karras et al. call sigma; infinite without signal."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """lambda = ln(alpha / sigma), with its limits."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


DATA = Point(0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Process(ABC):
    """What all processes share. The fields of each class are the keys of its table in config.json.

    `clip` bounds the denoised estimate; `grid` is the model's default grid.
    """

    kind: ClassVar[str]
    predictions: ClassVar[tuple[Prediction, ...]] = ("epsilon", "v", "sample")
    prediction: Prediction
    clip: float | None = None
    grid: GridName | None = None

    def __post_init__(self) -> None:
        if self.prediction not in self.predictions:
            known = ", ".join(self.predictions)
            raise UserError(
                f"process.prediction: {self.prediction!r} does not fit the {self.kind} process; it has {known}"
            )
        if self.clip is not None and self.clip <= 0.0:
            raise UserError(f"process.clip: must be above 0 or null, got {self.clip}")

    @property
    @abstractmethod
    def lowest(self) -> Point:
        """The least noise above none that grids end at."""

    @property
    @abstractmethod
    def highest(self) -> Point:
        """The most noise that grids by noise level begin at."""

    @abstractmethod
    def at_ratio(self, ratio: float) -> Point:
        """The point with this sigma / alpha."""

    def initial(self, first: Point, grid: GridName, by_level: bool) -> float:
        """Standard deviation of the initial state; `by_level` for solvers whose variable is the noise level."""
        return 1.0

    def denoise(self, p: Point) -> Coefficients:
        """c_* and clip: the denoised estimate from state and network output."""
        c_x, c_o = {
            "epsilon": lambda: (1.0 / p.alpha, -p.sigma / p.alpha),
            "v": lambda: (p.alpha, -p.sigma),
            "sample": lambda: (0.0, 1.0),
        }[self.prediction]()
        return {"t": p.t, "c_x": c_x, "c_o": c_o, "clip": math.inf if self.clip is None else self.clip}

    def noise(self, p: Point) -> tuple[float, float]:
        """(n_x, n_o): the noise estimate is n_x x + n_o o, of the output as it came, before any clipping."""
        return {
            "epsilon": lambda: (0.0, 1.0),
            "v": lambda: (p.sigma, p.alpha),
            "sample": lambda: (1.0 / p.sigma, -p.alpha / p.sigma),
        }[self.prediction]()

    def slope(self, p: Point) -> tuple[float, float, float, float]:
        """(tau, c, a, b): the probability-flow ODE as d(x / c)/d tau = a x / c + b m; tau = sigma / alpha here."""
        return p.ratio, p.alpha, 1.0 / p.ratio, -1.0 / p.ratio
