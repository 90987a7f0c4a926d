"""What a diffusion backbone offers, and the executor that gives every row of a batch its own depth.

A backbone is cut into pieces that each run on a prefix of rows sorted by depth: `enter` on all, blocks on those
that still need them, `leave` on all. Exits: Moon et al. (ICML 2024); sorted prefix: ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, cat, nn


@dataclass(frozen=True)
class Segment:
    """Blocks [start, stop), which always run on the same rows: those whose depth is above `rank`."""

    start: int
    stop: int
    rank: int


class Pieces(Protocol):
    """The parts of a network that the executor calls; a backend may run them in its own way."""

    always: int
    bypasses: bool

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """x (N, C, H, W), condition (N, M) -> hidden (N, T, D) and what later pieces need, each of N rows."""

    def segment(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Run the blocks of a segment on n rows: hidden (n, T, D) -> (n, T, D)."""

    def bypass(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """What is left of a segment for rows that skip its blocks; not called unless `bypasses`."""

    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """hidden (N, T, D) -> network output (N, C or 2 C, H, W)."""


class Backbone(nn.Module, ABC):
    """Base of diffusion backbones; itself the eager `Pieces`.

    Attributes:
        depth: blocks of the full network.
        always: blocks that `enter` runs on every row (0 where every block can be dropped).
        bypasses: whether a dropped block leaves something to run (`bypass`).
        ranks: for each block from `always` on, in the order they run: it runs on rows of depth above its rank.
        null_label: the label of the unconditional rows of guidance.
        row_shape: shape of one row's state, (C, H, W).
        learned_variance: whether the output has 2 C channels, the second half the learned variance.
    """

    depth: int
    always: int = 0
    bypasses: bool = False
    ranks: tuple[int, ...]
    null_label: int
    row_shape: tuple[int, int, int]
    learned_variance: bool = False

    @classmethod
    @abstractmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""

    @abstractmethod
    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """One-token work: network time t (N,), label (N,) int64 -> (N, M), which the other pieces take."""

    @abstractmethod
    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """See Pieces."""

    @abstractmethod
    def block(self, index: int, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Block `index` of the network on n rows, (n, T, D) -> (n, T, D)."""

    def bypass(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """See Pieces; by default a dropped block leaves nothing to run."""
        return hidden

    @abstractmethod
    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """See Pieces."""

    @abstractmethod
    def frozen_in_exits(self) -> list[nn.Module]:
        """Modules that exit fine-tuning leaves as they are: the time embedder."""

    def segment(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """See Pieces."""
        for index in range(segment.start, segment.stop):
            hidden = self.block(index, hidden, kept, condition)
        return hidden

    def forward(self, x: Tensor, condition: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Run every row to its own depth; see `sorted_prefix`."""
        return sorted_prefix(self, single_blocks(self), x, condition, depths)


def single_blocks(backbone: Backbone) -> list[Segment]:
    """One segment a block: serves any depths."""
    return [Segment(backbone.always + i, backbone.always + i + 1, rank) for i, rank in enumerate(backbone.ranks)]


def segments_between(backbone: Backbone, depths: Iterable[int]) -> list[Segment]:
    """The longest segments that serve rows of these depths: cut only where one of them ends."""
    wanted = sorted(set(depths))

    def rows(segment: Segment) -> tuple[bool, ...]:
        return tuple(depth > segment.rank for depth in wanted)

    merged: list[Segment] = []
    for one in single_blocks(backbone):
        if merged and rows(merged[-1]) == rows(one):
            merged[-1] = Segment(merged[-1].start, one.stop, one.rank)
        else:
            merged.append(one)
    return merged


def sorted_prefix(
    pieces: Pieces, segments: Sequence[Segment], x: Tensor, condition: Tensor, depths: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Run every row to its own depth.

    Args:
        x: states (N, C, H, W), float32.
        condition: what the backbone's `condition` returned for the rows, (N, M).
        depths: blocks to run per row, non-increasing, so that the rows of a block are a prefix.

    Returns:
        Network output (N, C or 2 C, H, W), and the number of rows that each block ran on.
    """
    hidden, *kept = pieces.enter(x, condition)
    total, rising = len(depths), depths[::-1]
    ran = [total] * pieces.always
    exited: list[Tensor] = []
    for segment in segments:
        n = total - bisect_right(rising, segment.rank)
        if not (n or pieces.bypasses):
            break
        ran += [n] * (segment.stop - segment.start)
        hidden, rest = hidden[:n], hidden[n:]
        if n:
            hidden = pieces.segment(segment, hidden, [tensor[:n] for tensor in kept], condition[:n])
        if pieces.bypasses and n < total:
            passed = pieces.bypass(segment, rest, [tensor[n:] for tensor in kept])
            hidden = cat([hidden, passed]) if n else passed
        elif len(rest):
            exited.append(rest)
    hidden = cat([hidden, *reversed(exited)]) if exited else hidden
    return pieces.leave(hidden, condition), ran
