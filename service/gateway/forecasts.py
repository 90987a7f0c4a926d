"""Admission foresees when an answer will be there; how such forecasts turned out says how far to trust the next one."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from service.protocol import LIMIT

LEAST, MOST = 0.5, 1.2  # shares of a budget
KEPT = 0.95  # share of it that an answer may take
NEAR = 0.75  # forecasts below that share of the limit say nothing of it
SEEN, SETTLED, ONE_IN = 64, 4, 20
PATIENCE, RISE = 2.0, 0.1  # budgets; share of one


class Forecasts:
    """What answers to work alike took, over what was foreseen: the last SEEN of those foreseen near the limit.

    The limit is such that work there ends within KEPT of its budget, but for one in ONE_IN. Others fill the same queue,
    so that one which is too low may refuse all and learn nothing: after PATIENCE budgets of that it is tried higher.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ratios: deque[float] = deque(maxlen=SEEN)
        self._limit = LIMIT
        self._refusing = (math.inf, -math.inf)  # since when, and last

    def limit(self) -> float:
        """Share of its budget that a job's forecast may be."""
        return self._limit

    def came_true(self, foreseen_s: float, took_s: float, budget_s: float, given_up: bool = False) -> None:
        """An answer took so long, or was given up then for want of time; 0 foreseen: nothing was."""
        if foreseen_s <= 0 or foreseen_s < NEAR * self._limit * budget_s:
            return
        self._refusing = (math.inf, -math.inf)
        self._ratios.append((max(took_s, budget_s) if given_up else took_s) / foreseen_s)
        known = len(self._ratios)
        if known >= SETTLED:
            worst = sorted(self._ratios)[-1 - known // ONE_IN]
            self._limit = min(MOST, max(LEAST, KEPT / worst)) if worst > 0 else MOST

    def refused(self, foreseen_s: float, budget_s: float) -> None:
        """Work was refused for the limit. What was let in near it is known, one way or the other, a budget later."""
        if foreseen_s > MOST * budget_s:
            return
        now, (since, last) = self._clock(), self._refusing
        since = now if now - last > budget_s else since
        self._refusing = (since, now)
        if now - since > PATIENCE * budget_s:
            self._refusing = (now, now)
            self._ratios.clear()
            self._limit = min(MOST, max(LIMIT, self._limit + RISE))
