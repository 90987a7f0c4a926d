"""How fast work drains, and how long a tick takes: what admission, deadlines and slack are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 30.0
PRESSED_MEMORY_S = 10.0
PRESSED_S = 0.5  # busy seconds under pressure that make a measurement
WINDOW = 64
SETTLED = 16


@dataclass(frozen=True)
class Pace:
    """Measured times, milliseconds; 0 where nothing was measured yet.

    Attributes:
        ms_per_tick: from one tick to the next while there is work, other models' ticks between them included.
        ms_per_cost: a unit of cost, in the recent tick that did most for its time.
    """

    ms_per_tick: float = 0.0
    ms_per_cost: float = 0.0


class Least:
    """Least of the last WINDOW to 2 WINDOW values; 0 until there were SETTLED (the first ticks warm up)."""

    def __init__(self) -> None:
        self._now = self._before = math.inf
        self._seen = 0

    def add(self, value: float) -> None:
        """One more value."""
        self._now = min(self._now, value)
        self._seen += 1
        if self._seen % WINDOW == 0:
            self._before, self._now = self._now, math.inf

    def value(self) -> float:
        """The least."""
        return min(self._now, self._before) if self._seen >= SETTLED else 0.0


class DrainRate:
    """Means are weighted exponentially by busy seconds; written by one thread, read by any.

    Busy seconds are those in which the engine had work, other engines' turns included: two busy models of one
    process drain at about half the rate that each would have alone. Idle seconds count for nothing.
    """

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._sums = (0.0, 0.0)
        self._ticks = (0.0, 0.0)
        self._pressed = (0.0, 0.0)
        self._ms_per_cost = Least()

    def add(self, cost: float, seconds: float) -> None:
        """`cost` was drained in `seconds` of busy time."""
        keep = math.exp(-seconds / self._memory_s)
        total, busy = self._sums
        self._sums = (total * keep + cost, busy * keep + seconds)

    def ticked(self, cost: float, seconds: float, own_s: float, pressed: bool) -> None:
        """As `add`, of a tick that moved rows and took `own_s` of them for itself; `pressed`: more work waited."""
        self.add(cost, seconds)
        if not pressed:
            self._pressed = (0.0, 0.0)
        else:
            forget = math.exp(-seconds / PRESSED_MEMORY_S)
            total, spent = self._pressed
            self._pressed = (total * forget + cost, spent * forget + seconds)
        keep = math.exp(-seconds / self._memory_s)
        ticks, busy = self._ticks
        self._ticks = (ticks * keep + 1, busy * keep + seconds)
        if cost > 0:
            self._ms_per_cost.add(own_s * 1000 / cost)

    def per_second(self) -> float:
        """Cost per busy second; 0 while nothing was measured."""
        total, busy = self._sums
        return total / busy if busy > 0 else 0.0

    def pressed_per_second(self) -> float:
        """Cost per second while more work waits than fits; 0 when none does, or too little was measured since."""
        total, spent = self._pressed
        return total / spent if spent >= PRESSED_S else 0.0

    def pace(self) -> Pace:
        """What a tick and a unit of cost take now."""
        ticks, busy = self._ticks
        return Pace(busy / ticks * 1000 if ticks else 0.0, self._ms_per_cost.value())
