"""The coefficient row that every solver fills: one per network evaluation, float64.

    net input  c_in x at time t;  o = net output
    m  = clamp(c_x x + c_o o, -clip, clip)                 usually the denoised estimate
    y  = k_x x + k_m m + k_1 h1 + k_2 h2 + k_s s           corrector / re-anchoring
    x' = a_y y + a_o o + a_m m + a_1 h1 + a_2 h2 + a_s s + a_n exp(lv0 / 2) z
    (x, s, h1, h2) <- (x', y, m, h1)

`lv1` is the other end of the learned log-variance range; without learned variance lv0 = lv1 = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIELDS = (
    *("t", "c_in", "c_x", "c_o", "clip"),
    *("k_x", "k_m", "k_1", "k_2", "k_s"),
    *("a_y", "a_o", "a_m", "a_1", "a_2", "a_s", "a_n", "lv0", "lv1"),
)
INDEX = {name: i for i, name in enumerate(FIELDS)}
DEFAULTS = {"c_in": 1.0, "k_x": 1.0, "clip": math.inf}

Table = NDArray[np.float64]  # (evaluations, len(FIELDS))


@dataclass(frozen=True)
class Process:
    """Variance-preserving cosine process, continuous in u: alpha = cos(pi u / 2), sigma = sin(pi u / 2).

    `prediction` is what the network outputs; `clip` bounds the denoised estimate.
    """

    prediction: str = "v"
    clip: float = math.inf

    def __post_init__(self) -> None:
        if self.prediction != "v":
            raise ValueError(f"prediction {self.prediction!r} is not supported; supported: v")

    def alpha(self, u: float) -> float:
        """Signal scale at time u; exactly 0 at u = 1."""
        return 0.0 if u >= 1.0 else math.cos(0.5 * math.pi * u)

    def sigma(self, u: float) -> float:
        """Noise scale at time u; exactly 0 at u = 0."""
        return 0.0 if u <= 0.0 else math.sin(0.5 * math.pi * u)

    def denoise(self, u: float) -> dict[str, float]:
        """Coefficients of the denoised estimate from a v output: m = alpha x - sigma v."""
        return {"t": u, "c_x": self.alpha(u), "c_o": -self.sigma(u), "clip": self.clip}


def log_snr_half(alpha: float, sigma: float) -> float:
    """lambda = ln(alpha / sigma), with its limits."""
    if sigma == 0.0:
        return math.inf
    return -math.inf if alpha == 0.0 else math.log(alpha / sigma)


def uniform_grid(steps: int) -> NDArray[np.float64]:
    """Times (steps + 1,), from 1 down to 0 in equal steps."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return 1.0 - np.arange(steps + 1) / steps


def fill(rows: list[dict[str, float]]) -> Table:
    """Coefficient dicts -> table (evaluations, fields); what a row does not name keeps its default."""
    table = np.zeros((len(rows), len(FIELDS)))
    for name, value in DEFAULTS.items():
        table[:, INDEX[name]] = value
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[i, INDEX[name]] = value
    return table


Solver = Callable[[Process, NDArray[np.float64]], Table]
