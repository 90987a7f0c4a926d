"""DPM-Solver++(2M), midpoint form: Lu et al. (2022, arXiv 2211.01095), algorithm 2; last step first order."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from models.solvers.table import Process, Table, fill, log_snr_half


def coefficients(process: Process, times: NDArray[np.float64]) -> Table:
    """Two-step multistep on the denoised estimate, at times (steps + 1,) -> table (steps, fields)."""
    lambdas = [log_snr_half(process.alpha(u), process.sigma(u)) for u in times]
    rows = []
    last = len(times) - 2
    for i, (u, v) in enumerate(itertools.pairwise(times)):
        h = lambdas[i + 1] - lambdas[i]
        p = -process.alpha(v) * math.expm1(-h)
        row = process.denoise(u) | {"a_y": process.sigma(v) / process.sigma(u), "a_m": p}
        if 0 < i < last:
            r = (lambdas[i] - lambdas[i - 1]) / h
            row |= {"a_m": p + 0.5 * p / r, "a_1": -0.5 * p / r}
        rows.append(row)
    return fill(rows)
