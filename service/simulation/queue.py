"""A model's queue as the scripts keep it (service/broker/lua/submit.lua, take.lua, expire.lua): the same verdicts and
the same order, from a first delivery to the end of a job. No leases, API keys or ids: nothing fails here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from models.api import GenerateWork, Priority
from service.broker.keys import RANKS
from service.protocol import LIMIT

Verdict = Literal["accepted", "full", "late"]
WEIGHTS: dict[Priority, int] = {"high": 8, "normal": 4, "low": 1}
ENDED = 100


@dataclass
class Entry:
    """A job: who asked (`number`), for what, and until when, milliseconds."""

    number: int
    work: GenerateWork
    cost: int
    submitted_ms: int
    deadline_ms: int
    rank: Priority = "normal"

    @property
    def rows(self) -> int:
        """Slots that it needs."""
        return len(self.work.seeds)


@dataclass
class Taken:
    """What a worker got; `full`: the next job did not fit; `ended`: out of time while they waited."""

    jobs: list[Entry] = field(default_factory=list)
    ended: list[Entry] = field(default_factory=list)
    full: bool = False


class SimQueue:
    """Jobs that wait, by rank.

    Attributes:
        asked: cost of all that was ever asked for and could have been done in time.
        backlog: cost waiting and running, by rank.
        pressed: each live worker's rate that deadlines are judged by, cost per second; 0: what comes begins at once.
    """

    def __init__(self, max_backlog: int) -> None:
        self.asked = 0
        self.backlog: dict[Priority, int] = dict.fromkeys(RANKS, 0)
        self.pressed: dict[int, float] = {}
        self._most = max_backlog
        self._waiting: dict[Priority, deque[Entry]] = {rank: deque() for rank in RANKS}
        self._tags: dict[Priority, float] = dict.fromkeys(RANKS, 0.0)
        self._clock = 0.0
        self._rate: float | None = None

    def __len__(self) -> int:
        """Jobs that wait."""
        return sum(map(len, self._waiting.values()))

    def announce(self, worker: int, pressed: float) -> None:
        """A worker says what it drains, with as many digits as the service keeps."""
        self.pressed[worker], self._rate = float(f"{pressed:.6g}"), None

    def submit(self, entry: Entry, limit: float = LIMIT) -> tuple[Verdict, float]:
        """Queue a job, or say why not; beside it the milliseconds foreseen for it, 0 where nothing is ahead.

        `limit`: share of its budget that these may be.
        """
        total, mine = sum(self.backlog.values()), self.backlog[entry.rank]
        ahead = sum(min(cost, mine * WEIGHTS[rank] / WEIGHTS[entry.rank]) for rank, cost in self.backlog.items())
        if total > 0 and total + entry.cost > self._most:
            self.asked += entry.cost
            return "full", 0.0
        rate, most_ms = self._drained(), limit * (entry.deadline_ms - entry.submitted_ms)
        foreseen_ms = (ahead + entry.cost) / rate * 1000 if rate > 0 and ahead > 0 else 0.0
        if foreseen_ms > most_ms:
            self.asked += entry.cost if entry.cost / rate * 1000 <= most_ms else 0
            return "late", foreseen_ms
        self.asked += entry.cost
        self._waiting[entry.rank].append(entry)
        self.backlog[entry.rank] += entry.cost
        return "accepted", foreseen_ms

    def _drained(self) -> float:
        """Cost per second of all workers; 0 where one begins at once what comes."""
        if self._rate is None:
            rates = self.pressed.values()
            self._rate = 0.0 if any(rate <= 0 for rate in rates) else sum(rates)
        return self._rate

    def take(self, now_ms: int, free: int, capacity: int) -> Taken:
        """Jobs for `free` rows of `capacity`, by weighted shares of the ranks, until one does not fit."""
        taken = Taken()
        while free > 0 and len(taken.ended) < ENDED:
            ranks = [rank for rank in RANKS if self._waiting[rank]]
            if not ranks:
                break
            rank = min(ranks, key=lambda rank: max(self._tags[rank], self._clock))
            entry = self._waiting[rank][0]
            room = free == capacity if entry.rows > capacity else entry.rows <= free
            if not room and entry.deadline_ms > now_ms:
                taken.full = True
                break
            self._waiting[rank].popleft()
            if entry.deadline_ms <= now_ms:
                self.close(entry)
                taken.ended.append(entry)
                continue
            taken.jobs.append(entry)
            free = max(0, free - entry.rows)
            self._clock = max(self._tags[rank], self._clock)
            self._tags[rank] = self._clock + entry.cost / WEIGHTS[rank]
        return taken

    def expire(self, before_ms: int) -> list[Entry]:
        """End the jobs that wait and whose deadline was before then."""
        over = [entry for entry in self._all() if entry.deadline_ms <= before_ms]
        for entry in over:
            self._waiting[entry.rank].remove(entry)
            self.close(entry)
        return over

    def close(self, entry: Entry) -> None:
        """A job is over: its cost goes back."""
        self.backlog[entry.rank] -= entry.cost

    def _all(self) -> Iterator[Entry]:
        return chain.from_iterable(self._waiting.values())
