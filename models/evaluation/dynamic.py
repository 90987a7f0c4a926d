"""E1: a one-step-late convergence exit against a fixed schedule, at matched cost and on the same weights.

Signal of a row: rms of the difference between its output and that of one exit earlier. Where it is among the
largest for its time and depth, the row runs one block more than the schedule at the next evaluation; among the
smallest, one block less. The shuffled control hands the same depths of each evaluation to other rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.evaluation.trajectories import Floats, Ints, Sampler, rms
from models.exits.plan import plan
from models.training.data import Images


def signal(guided: Tensor) -> Floats:
    """Change of the output over the last block, (len(depths), N); the shallowest exit is given its successor's."""
    change = rms(guided[1:] - guided[:-1])
    return np.concatenate([change[:1], change])


@dataclass
class Adaptive:
    """Depths of one batch. `low`, `high`: thresholds of the signal, (evaluations, len(depths)).

    `shuffle`: permute each evaluation's depths over the rows. `ran` records indices of depths, (N,) an evaluation.
    """

    schedule: Ints
    low: Floats
    high: Floats
    shuffle: np.random.Generator | None = None
    ran: list[Ints] = field(default_factory=list)
    late: Ints | None = None

    def __call__(self, e: int, guided: Tensor) -> Ints:
        """This evaluation's levels, decided one evaluation earlier; the signal now decides the next."""
        rows, top = guided.shape[1], len(guided) - 1
        step = np.zeros(rows, np.int64) if self.late is None else self.late
        own = np.clip(self.schedule[e] + step, 0, top)
        level = own if self.shuffle is None else self.shuffle.permutation(own)
        self.ran.append(level)
        seen = signal(guided)[own, np.arange(rows)]
        self.late = (seen > self.high[e, own]).astype(np.int64) - (seen < self.low[e, own])
        return level


def thresholds(sampler: Sampler, schedule: Ints, share: float, n: int, seed: int) -> tuple[Floats, Floats]:
    """Quantiles of the signal under the fixed schedule: `share` of rows lie below the low, and above the high, one."""
    seen: list[list[Floats]] = []
    for first in range(0, n, 50):
        batch: list[Floats] = []

        def fixed(e: int, guided: Tensor, batch: list[Floats] = batch) -> Ints:
            batch.append(signal(guided))
            return np.full(guided.shape[1], schedule[e])

        sampler.sample(min(50, n - first), seed + first, fixed)
        seen.append(batch)
    found = np.stack([np.concatenate([b[e] for b in seen], 1) for e in range(len(seen[0]))])
    return np.quantile(found, share, axis=2), np.quantile(found, 1 - share, axis=2)


def levels(sampler: Sampler) -> Ints:
    """Index of the schedule's depth at every evaluation."""
    index = {depth: i for i, depth in enumerate(sampler.depths)}
    return np.array([index[depth] for depth in plan(sampler.gear.schedule, sampler.trajectory.u)])


@dataclass(frozen=True)
class Arm:
    """What one policy sampled, and the blocks that it ran per network row."""

    images: Images
    blocks: float


def arm(sampler: Sampler, low: Floats, high: Floats, n: int, seed: int, shuffled: bool = False) -> Arm:
    """Sample `n` images; infinite thresholds are the fixed schedule."""
    rng = np.random.default_rng(seed) if shuffled else None
    images: list[NDArray[np.uint8]] = []
    blocks = 0.0
    for first in range(0, n, 50):
        policy = Adaptive(levels(sampler), low, high, rng)
        images.append(sampler.sample(min(50, n - first), seed + first, policy))
        blocks += np.asarray(sampler.depths)[np.stack(policy.ran)].sum()
    return Arm(np.concatenate(images), float(blocks / n))
