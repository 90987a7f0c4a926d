"""E0: how much of the depth that rows need is theirs, and how much is merely the time's.

The oracle depth d*(row, t) is the least exit whose guided output is within `tau` (root mean square over pixels) of
full depth. If the variance of d* at a given time is small, a schedule of time is as good as any adaptive exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.evaluation.trajectories import Floats, Ints, Sampler, rms


def errors(sampler: Sampler, n: int, seed: int, batch: int = 50) -> tuple[Floats, Ints]:
    """Output errors of full-depth trajectories, (len(depths), n, evaluations), and their labels (n,)."""
    parts = []
    for first in range(0, n, batch):
        steps: list[Floats] = []

        def whole(e: int, guided: Tensor, steps: list[Floats] = steps) -> Ints:
            steps.append(rms(guided - guided[-1]))
            return np.full(guided.shape[1], len(guided) - 1)

        sampler.sample(min(batch, n - first), seed + first, whole)
        parts.append(np.stack(steps, 2))
    return np.concatenate(parts, 1), np.arange(n) % sampler.model.null_label


@dataclass(frozen=True)
class Shares:
    """Where the variance of d* lies at one `tau`; shares of the total.

    `within_time`: what time does not explain. `within_time_label`: nor time and label together. `within_time_last`:
    nor time and the row's own d* one evaluation earlier (what a one-step-late exit could know).
    """

    tau: float
    mean_depth: float
    variance: float
    within_time: float
    within_time_label: float
    within_time_last: float


def oracle(found: Floats, depths: Sequence[int], tau: float) -> Ints:
    """d* (n, evaluations): the least exit whose error (len(depths), n, evaluations) is <= tau."""
    return np.asarray(depths)[(found <= tau).argmax(0)]


def within(values: Ints, *groups: Ints) -> float:
    """Share of the variance of `values` that is left inside groups (all flat, the same length)."""
    _, group = np.unique(np.stack(groups), axis=1, return_inverse=True)
    group = group.reshape(-1)
    means = np.bincount(group, values) / np.bincount(group)
    return float(np.square(values - means[group]).mean() / values.var())


def shares(found: Floats, labels: Ints, depths: Sequence[int], tau: float) -> Shares:
    """Decompose the variance of d* at `tau`."""
    star = oracle(found, depths, tau)
    n, evaluations = star.shape
    time = np.tile(np.arange(evaluations), n)
    flat = star.reshape(-1)
    if flat.var() == 0:
        return Shares(tau, float(flat.mean()), 0.0, 0.0, 0.0, 0.0)
    last = np.concatenate([np.zeros((n, 1), np.int64), star[:, :-1]], 1).reshape(-1)
    return Shares(
        tau=tau,
        mean_depth=float(flat.mean()),
        variance=float(flat.var()),
        within_time=within(flat, time),
        within_time_label=within(flat, time, np.repeat(labels, evaluations)),
        within_time_last=within(flat, time, last),
    )
