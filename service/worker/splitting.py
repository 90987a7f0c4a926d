"""Calls of a Task that fail are tried again in halves, until single rows are to blame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from models.api import StepStats

Reason = Literal["error", "memory"]
R = TypeVar("R")
T = TypeVar("T")
CALM_RUNS = 64
NO_MEMORY = (  # what PyTorch's allocators for CPUs and for pinned memory say, in a RuntimeError
    "can't allocate memory",
    "CUDA error: out of memory",
)


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    names = {kind.__name__ for kind in type(error).__mro__}
    said = any(words in str(error) for words in NO_MEMORY)
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or said


def is_lost(error: BaseException) -> bool:
    """Whether a device is of no more use to this process: after such an error every call fails, whoever's it is."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "AcceleratorError" in names and not is_memory(error)


class Splitter:
    """Runs calls over rows, all at once where that works.

    Attributes:
        limit: most rows of one call. Halved below what ran out of memory, doubled after CALM_RUNS good runs.
    """

    def __init__(self, capacity: int, on_split: Callable[[Reason], None]) -> None:
        self.limit = self._capacity = capacity
        self._on_split = on_split
        self._calm = 0

    def run(
        self,
        rows: Sequence[T],
        call: Callable[[Sequence[T]], R],
        blame: Callable[[T, Exception], None],
        wanted: Callable[[T], bool] = lambda row: True,
        reasons: tuple[Reason, ...] = ("error", "memory"),
    ) -> list[R]:
        """What `call` returned for the rows, or for each part of them.

        A failed part is halved if its error is one of `reasons`; `blame` gets the first row of a part that fails for
        good, in the `except` block. Rows that are not `wanted` any more (their job has failed) are left out. Only
        for calls that change nothing when they raise. The error is let go before the next call: its traceback holds
        on to the memory that ran out. An error that no row is to blame for (`is_lost`) goes to the caller.
        """
        made: list[R] = []
        parts = [rows[i : i + self.limit] for i in range(0, len(rows), self.limit)][::-1]
        too_many: list[Sequence[T]] = []
        while parts:
            part = [row for row in parts.pop() if wanted(row)]
            if not part:
                continue
            try:
                made.append(call(part))
                continue
            except Exception as error:
                if is_lost(error):
                    raise
                reason: Reason = "memory" if is_memory(error) else "error"
                if len(part) == 1 or reason not in reasons:
                    blame(part[0], error)
                    if reason == "memory":
                        too_many = [many for many in too_many if part[0] not in many]
                    continue
            if reason == "memory":
                too_many.append(part)
            self._on_split(reason)
            half = len(part) // 2
            parts += [part[half:], part[:half]]
        self._learn([len(many) for many in too_many])
        return made

    def _learn(self, too_many: Sequence[int]) -> None:
        """Parts of these sizes ran out of memory, though none of their rows is too large by itself."""
        if too_many:
            self.limit, self._calm = max(1, min(too_many) // 2), 0
        elif self.limit < self._capacity:
            self._calm += 1
            if self._calm == CALM_RUNS:
                self.limit, self._calm = min(self._capacity, 2 * self.limit), 0


def merged(parts: Sequence[StepStats]) -> StepStats | None:
    """The parts of a tick as one; None where nothing moved."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    counts: Counter[tuple[int, int]] = Counter()
    for part in parts:
        counts.update(part.depth_counts)
    return StepStats(
        rows=sum(part.rows for part in parts),
        decoded=sum(part.decoded for part in parts),
        waiting=frozenset().union(*(part.waiting for part in parts)),
        finished=frozenset().union(*(part.finished for part in parts)),
        layer_evals=sum(part.layer_evals for part in parts),
        layer_evals_full=sum(part.layer_evals_full for part in parts),
        depth_counts=counts,
    )
