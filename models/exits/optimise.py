"""The best fixed schedule at a compute budget, exactly: a knapsack over integer depth sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.api import ExitSchedule

Floats = NDArray[np.float64]


def equal_edges(bins: int) -> tuple[float, ...]:
    """Upper ends of equal bins of u."""
    return tuple((b + 1) / bins for b in range(bins))


def uniform_times(steps: int) -> list[float]:
    """Diffusion times of `steps` evaluations from u = 1, equally spaced: the grid of a solver on a continuous model."""
    return [1.0 - i / steps for i in range(steps)]


def visits(times: Sequence[float], bins: int) -> list[int]:
    """Evaluations that fall in each of `bins` equal bins when the solver visits `times`."""
    where = ExitSchedule(equal_edges(bins), tuple(range(1, bins + 1)))
    counts = [0] * bins
    for u in times:
        counts[where.depth(u) - 1] += 1
    return counts


def optimise(
    costs: Floats, depths: Sequence[int], evaluations: Sequence[int], budget: int, falling: bool = True
) -> list[int]:
    """Depth per bin of least total cost whose evaluations run at most `budget` blocks.

    Dynamic programming over bins; the state is (blocks run so far, depth of the last bin), so the answer is exact
    for costs that add up over bins.

    Args:
        costs: cost of a depth in a bin, (len(depths), bins), bins from data (u = 0) to noise.
        depths: exits that may be used, rising.
        evaluations: network calls of one trajectory in each bin.
        budget: blocks of one trajectory.
        falling: whether depth may not rise with u.

    Raises:
        ValueError: the budget does not even pay for the shallowest exit.
    """
    bins = costs.shape[1]
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, len(depths) - 1): (0.0, [])}
    for b in range(bins):
        after: dict[tuple[int, int], tuple[float, list[int]]] = {}
        for (spent, last), (cost, chosen) in best.items():
            for level in range(last + 1 if falling else len(depths)):
                key = spent + evaluations[b] * depths[level], level
                total = cost + float(costs[level, b])
                if key[0] <= budget and total < after.get(key, (math.inf, []))[0]:
                    after[key] = total, [*chosen, depths[level]]
        best = after
    if not best:
        raise ValueError(f"{budget} blocks are less than the shallowest exit {depths[0]} costs")
    return min(best.items(), key=lambda item: (item[1][0], item[0][0]))[1][1]


def greedy(costs: Floats, depths: Sequence[int], evaluations: Sequence[int], budget: int) -> list[int]:
    """The same by greed, for comparison: lower, again and again, the bin where a block less costs least."""
    bins = costs.shape[1]
    level = [len(depths) - 1] * bins
    while sum(depths[i] * n for i, n in zip(level, evaluations, strict=True)) > budget:
        rise = [costs[level[b] - 1, b] - costs[level[b], b] if level[b] else math.inf for b in range(bins)]
        cheapest = int(np.argmin(rise))
        if rise[cheapest] == math.inf:
            raise ValueError(f"{budget} blocks are less than the shallowest exit {depths[0]} costs")
        level[cheapest] -= 1
    return [depths[i] for i in level]


def to_schedule(per_bin: Sequence[int]) -> ExitSchedule:
    """Equal bins of u, neighbours of equal depth joined."""
    ends = [b for b in range(len(per_bin)) if b + 1 == len(per_bin) or per_bin[b + 1] != per_bin[b]]
    edges = equal_edges(len(per_bin))
    return ExitSchedule(tuple(edges[b] for b in ends), tuple(per_bin[b] for b in ends))
