"""How well confidence matches accuracy: reliability diagrams, ECE, Brier's parts, bootstrap errors. Numpy only.

The temperature itself is `scores.fit_temperature`, applied by `scores.soften`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Binning = Literal["width", "mass"]


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per bin the rows, their mean confidence and their accuracy (0 where empty)."""

    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def share(self) -> Floats:
        """Share of rows per bin."""
        return self.count / self.count.sum()

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over rows of |accuracy - confidence| of their bin."""
        return float((self.share * np.abs(self.accuracy - self.confidence)).sum())

    @property
    def worst(self) -> float:
        """Maximum calibration error: the largest |accuracy - confidence| of a bin that has rows."""
        return float(np.abs(self.accuracy - self.confidence)[self.count > 0].max())

    def brier_parts(self) -> dict[str, float]:
        """Murphy's parts (1973) of the Brier score of `is the top class right`.

        calibration - resolution + uncertainty is the score of forecasting each bin's mean confidence.
        """
        base = float((self.share * self.accuracy).sum())
        return {
            "calibration": float((self.share * (self.confidence - self.accuracy) ** 2).sum()),
            "resolution": float((self.share * (self.accuracy - base) ** 2).sum()),
            "uncertainty": base * (1.0 - base),
        }


def reliability(p: Floats, labels: NDArray[np.int64], bins: int = 15, by: Binning = "width") -> Reliability:
    """Bin rows by their largest probability (Guo et al., ICML 2017, section 2).

    Args:
        p: probabilities (N, K).
        labels: classes (N,).
        bins: number of bins.
        by: `width`: bins (i / bins, (i + 1) / bins]; `mass`: sorted rows cut into parts of equal size, a less
            biased estimate where most rows are sure (Roelofs et al., AISTATS 2022).
    """
    confidence, correct = p.max(-1), (p.argmax(-1) == labels).astype(np.float64)
    if by == "width":
        which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    else:
        which = np.empty(len(p), dtype=np.int64)
        which[np.argsort(confidence, kind="stable")] = np.arange(len(p)) * bins // len(p)
    count = np.bincount(which, minlength=bins)
    rows = np.maximum(count, 1)
    return Reliability(
        count,
        np.bincount(which, confidence, minlength=bins) / rows,
        np.bincount(which, correct, minlength=bins) / rows,
    )


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap standard error and 95 % percentile interval."""

    value: float
    se: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., float], *arrays: NDArray[Any], repeats: int = 200, seed: int = 0) -> Estimate:
    """`statistic(*arrays)` and its error over the draw of rows: all arrays are resampled together on axis 0.

    A paired comparison is a statistic of both methods' arrays. Biased upwards for statistics that bend
    (ECE, maxima): there trust `se`, not the interval's centre (Efron and Tibshirani, 1993, chapter 10).
    """
    rng, n = np.random.default_rng(seed), len(arrays[0])
    draws = np.empty(repeats)
    for i in range(repeats):
        rows = rng.integers(n, size=n)
        draws[i] = statistic(*(a[rows] for a in arrays))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(statistic(*arrays), float(draws.std(ddof=1)), float(low), float(high))
