"""The controller of gears: quality bends before the queue breaks. Pure: no clock, no Redis, no torch.

A rung's *strain* is the time that the work at hand would take there over the time that it may take; its *load* is the
arriving work over what the rung can do. Rungs go from the best (0) to the cheapest.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

RUNNING = 0.85  # share of what is left of a deadline that a running row may take
WAITING = 0.5  # share of a budget that a queue may take to drain; admission has a limit of its own
LOOSE = 0.7  # strain up to which the rung above may be taken
SPARE = 0.85  # load up to which it may be
HOLD_S = 1.0  # how long the rung above would have to do
MOST_HOLD_S = 8.0
FILLED = 0.7  # share of a budget that rows running side by side may take
BESIDE = 1.2  # how much slower than alone rows may be side by side, whatever the budget
DOOMED = 1.3  # times over its deadline, at the cheapest rung, from which no gear helps a row
MEMORY_S = 5.0
LONGEST_S, WORST = 0.25, 4.0  # a tick speaks for so long at most, and for so many times what was expected
RECENT = 64


class Governor:
    """Which rung to be in: down at once under strain, or while more is asked for than it can do; up one at a time after
    a calm. A climb that fails at once doubles the calm that the next one needs, one that lasts halves it."""

    def __init__(self, rungs: int) -> None:
        self.rung, self._rungs = 0, rungs
        self._hold_s = HOLD_S
        self._calm_since: float | None = None
        self._climbed = -math.inf

    def rested(self, idle_s: float) -> int:
        """The rung after so long without work."""
        return max(0, self.rung - int(idle_s / HOLD_S))

    def decide(self, now_s: float, strains: Sequence[float], loads: Sequence[float], idle_s: float = 0.0) -> int:
        """The rung from now on; `idle_s`: time without work until just now, which counts as calm."""
        if (rested := self.rested(idle_s)) != self.rung:
            self.rung, self._hold_s, self._calm_since = rested, HOLD_S, None
        enough = [strain <= 1 and (strain <= LOOSE or load <= 1) for strain, load in zip(strains, loads, strict=True)]
        if not enough[self.rung] and self.rung < self._rungs - 1:
            self._descend(now_s, enough)
        elif self.rung:
            self._climb(now_s, strains[self.rung - 1], loads[self.rung - 1])
        return self.rung

    def _descend(self, now_s: float, enough: Sequence[bool]) -> None:
        failed = now_s - self._climbed < HOLD_S
        self._hold_s = min(MOST_HOLD_S, 2 * self._hold_s) if failed else max(HOLD_S, self._hold_s / 2)
        below = range(self.rung + 1, self._rungs)
        self.rung = next((rung for rung in below if enough[rung]), self._rungs - 1)
        self._calm_since = None

    def _climb(self, now_s: float, strain: float, load: float) -> None:
        """Calm is a time in which the rung above would have done; at its end it has to do with something to spare."""
        if strain > 1 or load > SPARE:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now_s
        elif now_s - self._calm_since >= self._hold_s and strain <= LOOSE:
            self.rung, self._climbed, self._calm_since = self.rung - 1, now_s, None


class TickTime:
    """Milliseconds of a tick by its work: a curve measured once, and one factor that follows the present.

    Args:
        points: (units, milliseconds), both rising; none: proportional, unknown until `measured`.
    """

    def __init__(self, points: Sequence[tuple[float, float]] = ()) -> None:
        self._units = [units for units, _ in points]
        self._curve = [ms for _, ms in points]
        self._factor = 1.0 if points else 0.0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._factor > 0

    def measured(self, units: float, ms: float) -> None:
        """A tick with so much work took so long."""
        found = ms / self._base(units)
        if not self.known:
            self._factor = found
            return
        keep = math.exp(-min(ms / 1000, LONGEST_S) / MEMORY_S)
        self._factor = keep * self._factor + (1 - keep) * min(found, WORST * self._factor)

    def ms(self, units: float) -> float:
        """What a tick with so much work takes now; 0 while unknown."""
        return self._factor * self._base(units)

    def _base(self, units: float) -> float:
        """The curve: straight between its points and beyond the last; the first point's time is the least."""
        if not self._curve:
            return units
        if units <= self._units[0] or len(self._units) == 1:
            return self._curve[0] * max(1.0, units / self._units[0])
        right = min(bisect_left(self._units, units), len(self._units) - 1)
        slope = (self._curve[right] - self._curve[right - 1]) / (self._units[right] - self._units[right - 1])
        return self._curve[right] + slope * (units - self._units[right])


@dataclass(frozen=True)
class Row:
    """A row in flight: evaluations to come, milliseconds to its deadline, mean units of an evaluation by rung."""

    left: int
    slack_ms: float
    units: tuple[float, ...]


@dataclass(frozen=True)
class Queue:
    """A model's queue as the last take saw it.

    Attributes:
        backlog: cost queued and running, of all workers; 0 where the take left room, since nothing waits then.
        asked: cost of all that was ever asked for and could have been done in time by an idle service.
        workers: live ones, at least 1.
    """

    backlog: float = 0.0
    asked: float = 0.0
    workers: int = 1


class Usual:
    """What rows were like lately: evaluations, units of an evaluation by rung, cost.

    `budget_ms`: a quarter of the recent jobs had no more; 0 before the first.
    """

    def __init__(self, rungs: int) -> None:
        self.budget_ms = 0.0
        self._rows = 0.0
        self._sums = [0.0] * (rungs + 2)
        self._budgets: deque[float] = deque(maxlen=RECENT)

    def saw(self, rows: int, evaluations: int, units: Sequence[float], cost: float, budget_ms: float | None) -> None:
        """A job: its rows, each of which has so many evaluations, units by rung, and cost; None for a budget that no
        rung could keep."""
        keep = math.exp(-rows / RECENT)
        self._rows = self._rows * keep + rows
        values = (evaluations, cost, *units)
        self._sums = [total * keep + rows * value for total, value in zip(self._sums, values, strict=True)]
        if budget_ms is not None:
            self._budgets.append(budget_ms)
            self.budget_ms = sorted(self._budgets)[len(self._budgets) // 4]

    def row(self) -> tuple[float, float, list[float]]:
        """Evaluations, cost and units by rung of the usual row."""
        evaluations, cost, *units = (total / self._rows for total in self._sums)
        return evaluations, cost, units


def capacity(usual: Usual, time: TickTime, slots: int, rung: int) -> float:
    """Cost per second in `rung`: as many rows side by side as end within `FILLED` of their budget, or slow each other
    down by no more than `BESIDE`."""
    if not usual.budget_ms or not time.known:
        return 0.0
    evaluations, cost, units = usual.row()
    allowed = max(FILLED * usual.budget_ms, BESIDE * evaluations * time.ms(units[rung]))
    fits, most = 1, slots
    while fits < most:
        rows = (fits + most + 1) // 2
        if evaluations * time.ms(rows * units[rung]) <= allowed:
            fits = rows
        else:
            most = rows - 1
    spent = evaluations * time.ms(fits * units[rung])
    return 1000 * fits * cost / spent if spent > 0 else 0.0


@dataclass(frozen=True)
class Strain:
    """Of a rung: its tightest running row, and its queue."""

    running: float
    waiting: float


def strain(
    rows: Sequence[Row], queued: float, held: float, budget_ms: float, time: TickTime, rates: Sequence[float]
) -> list[Strain]:
    """Strain of each rung, were all rows in it.

    Args:
        queued, held: cost that waits for one worker, and that it has in hand.
        budget_ms: what the queue is measured by.
        rates: what each rung can do, cost per second; 0 where unknown.
    """
    ticks = [time.ms(sum(row.units[rung] for row in rows)) for rung in range(len(rates))]
    saved = [row for row in rows if 0 < row.left * ticks[-1] < DOOMED * row.slack_ms]
    tightest = max((row.left / row.slack_ms for row in saved), default=0.0)
    drained = [1000 * (held + queued) / rate / budget_ms if queued > 0 and rate > 0 else 0.0 for rate in rates]
    return [Strain(tightest * tick / RUNNING, spent / WAITING) for tick, spent in zip(ticks, drained, strict=True)]


class Arrivals:
    """Cost per second that is asked of one worker, weighted exponentially by time."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self._rate = 0.0

    def seen(self, now_s: float, queue: Queue) -> None:
        """What the counter stands at now."""
        if self._last is not None and now_s > self._last[0]:
            seconds, cost = now_s - self._last[0], max(0.0, queue.asked - self._last[1]) / queue.workers
            keep = math.exp(-seconds / MEMORY_S)
            self._rate = keep * self._rate + (1 - keep) * cost / seconds
        if self._last is None or now_s > self._last[0]:
            self._last = (now_s, queue.asked)

    def per_second(self) -> float:
        """0 while unknown."""
        return self._rate
