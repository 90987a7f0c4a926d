"""CUDA graphs of a generator's tick: the update of any rows, and whole ticks of a few rows of one depth.

A lone request is all launches: at one row a tick's kernels take less time than the host needs to launch them one by
one, segment by segment. Rows of one depth need no segments, so their whole tick is one graph.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from functools import partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from models.backbones.interface import Backbone
from models.backends.cudagraph import CudaGraph, buckets_up_to
from models.backends.interface import Backend, BackendUnavailable
from models.solvers.kernel import update
from models.solvers.noise import normal
from models.solvers.table import FIELDS, INDEX
from models.tasks.pool import Ints, RowPool
from models.tasks.tick import Tick

SMALL = 8  # rows of a whole tick's graph, at most
SLOT, EVALUATION, SEED, LABEL, GUIDANCE, COEF = range(6)  # columns of the index, the last the first of many
WIDTH = COEF + -(-len(FIELDS) // 2)  # guidance is the bits of a float64, coefficients those of two float32 a column
log = logging.getLogger(__name__)


def tick_graphs(pool: RowPool, backend: Backend, model: Backbone) -> TickGraphs | None:
    """Graphs where the backend has some; without, and a word in the log, where a tick cannot be captured."""
    if not isinstance(backend, CudaGraph):
        return None
    try:
        return TickGraphs(pool, backend, model)
    except BackendUnavailable as error:
        log.warning("ticks are launched op by op around the network's graphs: %s", error)
        return None


class TickGraphs:
    """Graphs over a pool with a spare slot, which rows that only fill up a bucket belong to.

    Attributes:
        most: rows of the largest update; larger batches go without graphs.
    """

    @torch.inference_mode()
    def __init__(self, pool: RowPool, backend: CudaGraph, model: Backbone) -> None:
        self.pool, self.backend, self.model = pool, backend, model
        self.update = torch.compile(update, dynamic=True) if backend.fuses else update
        self.buckets = buckets_up_to(pool.capacity)
        self.most = self.buckets[-1]
        self.index = torch.zeros(self.most, WIDTH, dtype=torch.int64, device=pool.device)
        self.index[:, SLOT] = pool.capacity
        self.output = torch.zeros(self.most, *pool.row_shape, device=pool.device)
        self.variance = torch.zeros_like(self.output) if model.learned_variance else None
        self.updates = {
            (bucket, noisy): backend.capture(partial(self._update, bucket, noisy))[0]
            for bucket, noisy in product(reversed(self.buckets), (False, True))
        }
        self.blocks: dict[tuple[int, int], int] = {}
        self.ticks = {
            key: backend.capture(partial(self._tick, *key))[0]
            for key in product(self._small(), sorted(backend.depths), (False, True), (False, True))
        }

    def _small(self) -> list[int]:
        return [bucket for bucket in reversed(self.buckets) if bucket <= SMALL]

    def finish(self, tick: Tick, output: Tensor, variance: Tensor | None) -> None:
        """Update the tick's rows with their network's output and learned variance (N, C, H, W)."""
        n = len(tick.rows)
        bucket = self._place(tick)
        self.output[:n].copy_(output)
        if self.variance is not None and variance is not None:
            self.variance[:n].copy_(variance)
        self.updates[bucket, self._noisy(tick)]()

    def whole(self, tick: Tick) -> Ints | None:
        """Run the tick, and return the blocks that each row ran; None, and nothing is done, where it has no graph."""
        n, depth, guided = len(tick.rows), tick.depths[0], tick.paired
        if n > min(SMALL, self.most) or depth != tick.depths[-1] or len(tick.source) != (2 * n if guided else n):
            return None
        bucket = self._place(tick)
        self.ticks[bucket, depth, guided, self._noisy(tick)]()
        return np.full(n, self.blocks[bucket, depth], np.int64)

    def _noisy(self, tick: Tick) -> bool:
        return bool(self.pool.noisy[tick.rows, tick.at].any())

    def _place(self, tick: Tick) -> int:
        """Write the tick's index and return its bucket."""
        pool, n = self.pool, len(tick.rows)
        bucket = self.buckets[bisect_left(self.buckets, n)]
        index = np.zeros((bucket, WIDTH), np.int64)
        index[:, SLOT] = pool.capacity
        guidance = pool.guidance[tick.rows].astype(np.float64).view(np.int64)
        index[:n, :COEF] = np.stack([tick.rows, tick.at, pool.seed[tick.rows], pool.label[tick.rows], guidance], 1)
        index.view(np.float32)[:n, 2 * COEF : 2 * COEF + len(FIELDS)] = tick.coef
        pool.uplink.write(self.index[:bucket], index)
        return bucket

    def _update(self, bucket: int, noisy: bool) -> list[Tensor]:
        """What is captured for `finish`."""
        v = None if self.variance is None else self.variance[:bucket]
        self._advance(self.index[:bucket], self.output[:bucket], v, noisy)
        return []

    def _advance(self, index: Tensor, output: Tensor, v: Tensor | None, noisy: bool) -> None:
        pool, here = self.pool, index[:, SLOT]
        z = normal(index[:, SEED], index[:, EVALUATION], pool.row_shape) if noisy else torch.zeros_like(output)
        x, s, h1, h2 = pool.states[:, here]
        pool.states[:, here] = torch.stack(self.update(_coef(index), x, s, h1, h2, output, z, v))

    def _tick(self, bucket: int, depth: int, guided: bool, noisy: bool) -> list[Tensor]:
        """What is captured for `whole`."""
        pool, index = self.pool, self.index[:bucket]
        here, label, coef = index[:, SLOT], _own(index[:, LABEL]), _coef(index)
        x, t = pool.x[here] * coef[:, INDEX["c_in"], None, None, None], _own(coef[:, INDEX["t"]])
        if guided:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            label = torch.cat([label, torch.full_like(label, self.model.null_label)])
        output, ran = self.backend.uncaptured(x, t, label, depth)
        self.blocks[bucket, depth] = sum(rows > 0 for rows in ran)
        conditional, v = output[:bucket], None
        if self.model.learned_variance:
            conditional, v = conditional.chunk(2, dim=1)
        if guided:
            plain = output[bucket:, : conditional.shape[1]]
            scale = index[:, GUIDANCE].view(torch.float64).float()[:, None, None, None]
            conditional = plain + scale * (conditional - plain)
        self._advance(index, conditional, v, noisy)
        return []


def _coef(index: Tensor) -> Tensor:
    """Coefficients (N, len(FIELDS)) of the rows of an index, in memory of their own."""
    return _own(index[:, COEF:].view(torch.float32)[:, : len(FIELDS)])


def _own(value: Tensor) -> Tensor:
    """A copy laid out as compiled parts expect their inputs; .contiguous() leaves a slice of one row as it is."""
    return value.clone(memory_format=torch.contiguous_format)
