"""DDIM, deterministic (eta = 0): Song et al. (ICLR 2021), equation 12."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from models.solvers.table import Process, Table, fill


def coefficients(process: Process, times: NDArray[np.float64]) -> Table:
    """x' = alpha' m + sigma' e with e = sigma x + alpha v, at times (steps + 1,) -> table (steps, fields)."""
    rows = []
    for u, v in itertools.pairwise(times):
        noise = process.sigma(v)
        rows.append(
            process.denoise(u)
            | {"a_m": process.alpha(v), "a_y": noise * process.sigma(u), "a_o": noise * process.alpha(u)}
        )
    return fill(rows)
