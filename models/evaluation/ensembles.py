"""Deep ensembles of every size, from the members that are served and those kept for evaluation alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from models.evaluation.score import Answers, Floats, Score, TableRow
from models.registry import BACKBONES, resolve
from models.store import read_config
from models.tasks.beside import filled
from models.uncertainty.scores import mean_log_probability

MOST = 70  # subsets of one size; a pool of 8 has no more of any


def load_network(folder: Path, config: dict[str, Any], name: str) -> Any:
    """A member or student by its file, eval mode, float32."""
    network = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
    return filled(network, folder, config, name)


def load_pool(ensemble: Path) -> list[Any]:
    """All members that an ensemble folder has: those served, the source first, then its `pool`."""
    config = read_config(ensemble, "ensemble")
    return [load_network(ensemble, config, name) for name in [*config["members"], *config.get("pool", [])]]


def subsets(n: int, size: int, most: int = MOST) -> list[tuple[int, ...]]:
    """Every subset of range(n) of a size, in order; `most` different ones drawn with a fixed seed where there are
    more."""
    if comb(n, size) <= most:
        return list(itertools.combinations(range(n), size))
    rng = np.random.default_rng(0)
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < most:
        drawn.add(tuple(int(i) for i in np.sort(rng.choice(n, size, replace=False))))
    return sorted(drawn)


def averaged(members: Answers, which: tuple[int, ...]) -> Answers:
    """The mean probability of some of the members, whose log probabilities are (N, M, K)."""

    def mean(log_p: Floats) -> Floats:
        return mean_log_probability(log_p[:, list(which)])

    foreign = None if members.foreign is None else mean(members.foreign)
    return Answers(mean(members.selection), mean(members.test), foreign)


def rows_of_ensembles(members: Answers, served: int, scored: Callable[[Answers], Score]) -> dict[str, TableRow]:
    """The source as it is and at its best temperature, DE-m up to the size served, and the one that is served.

    Args:
        members: log probabilities (N, M, K) of the whole pool, the `served` ones first.
        served: how many of them answer for the service.
        scored: how one method is scored.
    """
    n = members.test.shape[1]
    one = averaged(members, (0,))
    source = scored(one)
    rows = {"source": TableRow([source]), "source at T*": TableRow([scored(one.softened(source.temperature))])}
    for size in range(1, served + 1):
        chosen = subsets(n, size)
        rows[f"DE-{size}"] = TableRow([scored(averaged(members, which)) for which in chosen], chosen, n)
    if n > served:
        rows[f"DE-{served} served"] = TableRow([scored(averaged(members, tuple(range(served))))])
    return rows
