"""How fast work drains: cost finished per second of busy time, recent seconds weighing most."""

from __future__ import annotations

import math

MEMORY_S = 30.0


class DrainRate:
    """Exponentially weighted by busy seconds; written by one thread, read by any."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sums = (0.0, 0.0)

    def add(self, cost: float, seconds: float) -> None:
        """`cost` was finished in `seconds` of busy time."""
        keep = math.exp(-seconds / self._memory_s)
        total, busy = self._sums
        self._sums = (total * keep + cost, busy * keep + seconds)

    def per_second(self) -> float:
        """Cost per busy second; 0 while nothing was measured."""
        total, busy = self._sums
        return total / busy if busy > 0 else 0.0
