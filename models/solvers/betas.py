"""Noise schedules of discrete processes: from a model's `betas` table to cumulative products, float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import UserError

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def squaredcos(timesteps: int, cap: float = 0.999) -> NDArray[np.float64]:
    """Cosine schedule (Nichol & Dhariwal, ICML 2021, equation 17), offset 0.008, betas capped."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * 0.5 * math.pi) ** 2

    products = [alpha_bar(i / timesteps) for i in range(timesteps + 1)]
    return np.array([min(cap, 1.0 - after / before) for before, after in pairwise(products)])


def beta_table(timesteps: int, table: Mapping[str, Any]) -> NDArray[np.float64]:
    """Betas (timesteps,) of {"trained": [...]} or {"schedule": ..., "start": ..., "end": ...}.

    Raises:
        UserError: unknown or missing keys, or betas that are no variances, by name.
    """
    unknown = set(table) - ({"trained"} if "trained" in table else {"schedule", "start", "end"})
    if unknown:
        raise UserError(f"process.betas: unknown key {sorted(unknown)[0]!r}")
    if "trained" in table:
        betas = np.asarray(table["trained"], dtype=np.float64)
        if betas.shape != (timesteps,):
            raise UserError(f"process.betas.trained: needs {timesteps} numbers, has shape {betas.shape}")
        return betas
    schedule = table.get("schedule")
    if schedule not in SCHEDULES:
        raise UserError(f"process.betas.schedule: {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if schedule == "squaredcos_cap_v2":
        return squaredcos(timesteps)
    for key in ("start", "end"):
        if not isinstance(table.get(key), int | float):
            raise UserError(f"process.betas.{key}: a number is needed for the {schedule} schedule")
    start, end = float(table["start"]), float(table["end"])
    if schedule == "linear":
        return np.linspace(start, end, timesteps)
    return np.square(np.linspace(math.sqrt(start), math.sqrt(end), timesteps))


def alpha_bars(timesteps: int, table: Mapping[str, Any], zero_terminal_snr: bool) -> NDArray[np.float64]:
    """Cumulative products of 1 - beta (timesteps,), strictly falling.

    With `zero_terminal_snr`, square roots are shifted and scaled to end at exactly 0 (Lin et al., WACV 2024,
    algorithm 1).
    """
    betas = beta_table(timesteps, table)
    if not ((betas > 0.0) & (betas < 1.0)).all():
        raise UserError("process.betas: every beta must lie between 0 and 1, both exclusive")
    products = np.cumprod(1.0 - betas, dtype=np.float64)
    if not zero_terminal_snr:
        return products
    roots = np.sqrt(products)
    return (((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2).astype(np.float64)
