"""One answer from several networks on the same source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.uncertainty.scores import mean_log_probability

Floats = NDArray[np.float64]
FLOOR = 1e-6


def mixture(log_p: Floats, source_log_p: Floats, source_weight: float) -> Floats:
    """Log probabilities (N, K) of p = (mean of `log_p` (N, M, K) - w source) / (1 - w), source (N, K).

    Kim et al. (ICLR 2024): M bridges of N teachers hold the source M times; w = (M - 1) / (M N) leaves it once. A
    negative w lets the source in: w = -1 / M makes it one more of them, as the bridges of Yun et al. (ICML 2023) want.
    """
    mean = mean_log_probability(log_p)
    if source_weight == 0.0:
        return mean
    p = np.clip((np.exp(mean) - source_weight * np.exp(source_log_p)) / (1.0 - source_weight), FLOOR, None)
    return np.asarray(np.log(p / p.sum(-1, keepdims=True)))
