"""DDPM ancestral sampling, `fixed_small` variance: Ho et al. (NeurIPS 2020), equations 6 and 7."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from models.solvers.table import Process, Table, fill


def coefficients(process: Process, times: NDArray[np.float64]) -> Table:
    """Posterior mean and noise between visited times (steps + 1,), falling -> table (steps, fields)."""
    rows = []
    for u, v in itertools.pairwise(times):
        here, there = process.alpha(u) ** 2, process.alpha(v) ** 2
        var, var_next = process.sigma(u) ** 2, process.sigma(v) ** 2
        b = 1.0 - here / there
        rows.append(
            process.denoise(u)
            | {
                "a_m": math.sqrt(there) * b / var,
                "a_y": math.sqrt(here / there) * var_next / var,
                "a_n": math.sqrt(max(0.0, var_next / var * b)),
            }
        )
    return fill(rows)
