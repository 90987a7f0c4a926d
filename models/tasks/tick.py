"""What a tick of a generator moves, worked out on the host before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from models.solvers.table import INDEX
from models.tasks.pool import Ints, RowPool


@dataclass(frozen=True)
class Tick:
    """N rows, deepest first, and their M network rows: a guided row has two, side by side, the unconditional second.

    Attributes:
        rows, at: slot and evaluation (N,).
        coef: coefficients of the evaluations (N, len(FIELDS)), float32.
        copies: network rows of each row (N,).
        source: the row that a network row is of (M,).
        labels, times, depths: of the network rows (M,).
    """

    rows: Ints
    at: Ints
    coef: NDArray[np.float32]
    copies: NDArray[np.int8]
    source: Ints
    labels: Ints
    times: NDArray[np.float32]
    depths: list[int]

    @classmethod
    def of(cls, pool: RowPool, slots: Ints, null_label: int) -> Self:
        """The next evaluation of the rows in `slots`."""
        rows, at = pool.by_depth(slots)
        coef, copies = pool.coef[rows, at], pool.copies[rows, at]
        source = np.repeat(np.arange(len(rows)), copies)
        labels = pool.label[rows][source]
        labels[np.cumsum(copies)[copies == 2] - 1] = null_label
        depths = pool.depth[rows, at][source].tolist()
        return cls(rows, at, coef, copies, source, labels, coef[source, INDEX["t"]], depths)

    @property
    def paired(self) -> bool:
        """Whether any row is guided."""
        return len(self.source) > len(self.rows)

    @property
    def last(self) -> Ints:
        """Each row's last network row (N,)."""
        ends: Ints = np.cumsum(self.copies, dtype=np.int64) - 1
        return ends

    @property
    def first(self) -> Ints:
        """Each row's first network row (N,)."""
        return self.last - self.copies + 1

    def ran(self, per_block: Sequence[int]) -> Ints:
        """Blocks that each row ran (N,), from the network rows that each block ran on."""
        blocks: Ints = (np.asarray(per_block)[None, :] > self.first[:, None]).sum(1)
        return blocks
