"""Workers that share a queue, as events on one simulated clock. Engines, schedulers and controllers are the service's.

A tick runs when it begins and is told when it ends; until then the worker's lane goes by the room it had before: the
real one also looks at what is about to end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from typing import Any

from models.api import GenerateParams, GenerateWork, ModelInfo
from service.gateway.admission import price
from service.gateway.forecasts import Forecasts
from service.gateway.resolve import generate_work
from service.gateway.shedding import Flows
from service.metrics import WorkerMetrics
from service.protocol import Delivery, GenerateJob
from service.simulation.queue import Entry, SimQueue
from service.simulation.task import Clock, SimTask
from service.simulation.traces import Arrival
from service.worker.engine import Engine, Finished, Tick
from service.worker.gears import Queue, TickTime
from service.worker.lane import step_back_s

LOOK_S = 0.001  # from an entry or room to the take that sees it
ANSWER_S = 0.004  # from a tick's end to the answer: encode, store, wake
WAIT_S, NEWS_S, ANNOUNCE_S, SWEEP_S, GRACE_MS = 1.0, 0.2, 2.0, 2.0, 2000

SOME = 32


@dataclass
class Seen:
    """What became of a request: a refusal (full, late) or an end (ok, expired), after `took_ms`; what was foreseen."""

    arrival: Arrival
    deadline_ms: int
    outcome: str = ""
    took_ms: float = 0.0
    foreseen_ms: float = 0.0
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def in_time(self) -> bool:
        """Whether it was answered within its deadline."""
        return self.outcome == "ok" and self.took_ms <= self.deadline_ms


@dataclass(eq=False)
class Worker:
    """An engine and its lane.

    Attributes:
        room, seen: rows that it may take, as it knows now and knew after its last look.
        ticking, waiting, looking: a tick is under way; it waits for entries; it is about to look.
        looks, told: how often it has looked, and when it last saw the queue.
        changes: of its rung.
        held: jobs in hand, by attempt.
    """

    number: int
    engine: Engine
    room: int
    seen: int = 0
    ticking: bool = False
    waiting: bool = False
    looking: bool = False
    looks: int = 0
    told: float = 0.0
    changes: int = 0
    held: dict[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Terms:
    """What a run is under: slots of a worker, default deadline, largest backlog, whether gears adapt, tick noise."""

    workers: int = 1
    slots: int = 64
    deadline_ms: int = 120_000
    max_backlog: int = 500_000
    adapt: bool = True
    noise: float = 0.0
    seed: int = 0


class Fleet:
    """`workers` of one model and their queue; `run` serves a trace once.

    Attributes:
        samples: (second, mean rung, backlog) each second.
    """

    def __init__(self, info: ModelInfo, points: Sequence[tuple[float, float]], terms: Terms = Terms()) -> None:
        self.samples: list[tuple[float, float, int]] = []
        self._info, self._terms = info, terms
        self._clock, self._queue, self._draw = Clock(), SimQueue(terms.max_backlog), random.Random(terms.seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order, self._left, self._view = count(), 0, (0.0, Queue())
        self._seen: list[Seen] = []
        self._flows = Flows(self._clock)
        self._work = lru_cache(1024)(self._resolved)
        curve, metrics = TickTime(points), WorkerMetrics()
        self.workers = [self._worker(i, curve, metrics, points) for i in range(terms.workers)]
        self._waiting = list(self.workers)
        for worker in self.workers:
            worker.waiting = True

    def _worker(self, number: int, curve: TickTime, metrics: WorkerMetrics, points: Sequence[Any]) -> Worker:
        terms = self._terms
        task = SimTask(self._info, terms.slots, self._clock, curve.ms, terms.noise, terms.seed + number)
        engine = Engine(task, metrics, self._clock, checkpoint_ticks=0, points=points, adapt=terms.adapt)
        return Worker(number, engine, terms.slots)

    @property
    def backlog(self) -> int:
        """Cost that waits or runs."""
        return sum(self._queue.backlog.values())

    def run(self, arrivals: Sequence[Arrival]) -> list[Seen]:
        """Serve a trace; what became of each request, in its order."""
        self._seen = [Seen(one, one.deadline_ms or self._terms.deadline_ms) for one in arrivals]
        self._left = len(arrivals)
        for worker in self.workers:
            self._queue.announce(worker.number, 0.0)
            self._at(ANNOUNCE_S * self._draw.random(), self._announce, worker, True)
        self._at(arrivals[0].at, self._arrive, 0)
        self._at(0.0, self._sample)
        self._at(SWEEP_S, self._sweep)
        while self._left:
            self._clock.now, _, happen, args = heappop(self._events)
            happen(*args)
        return self._seen

    def _at(self, time: float, happen: Callable[..., None], *args: Any) -> None:
        heappush(self._events, (time, next(self._order), happen, args))

    def _after(self, seconds: float, happen: Callable[..., None], *args: Any) -> None:
        self._at(self._clock.now + seconds, happen, *args)

    def _now_ms(self) -> int:
        return int(self._clock.now * 1000)

    def _resolved(
        self, n: int, gear: str, floor: str | float | None, most: float | None, steps: int | None
    ) -> tuple[GenerateWork, int]:
        """The work and its price; cached: requests that ask alike share it."""
        params = GenerateParams(n=n, gear=gear, floor=floor, max_compute=most, steps=steps, seed=0, label=0)
        work = generate_work(params, self._info, "png")
        return work, price(work, self._info)

    def _arrive(self, number: int) -> None:
        if number + 1 < len(self._seen):
            self._at(self._seen[number + 1].arrival.at, self._arrive, number + 1)
        seen, now = self._seen[number], self._now_ms()
        one = seen.arrival
        work, cost = self._work(one.n, one.gear, one.floor, one.max_compute, one.steps)
        entry = Entry(number, work, cost, now, now + seen.deadline_ms, one.priority)
        verdict, seen.foreseen_ms = self._queue.submit(entry, self._forecasts(seen).limit())
        if verdict != "accepted":
            self._end(number, verdict)
            if verdict == "late":
                self._forecasts(seen).refused(seen.foreseen_ms / 1000, seen.deadline_ms / 1000)
        else:
            self._call()

    def _end(self, number: int, outcome: str, receipt: dict[str, Any] | None = None) -> None:
        seen = self._seen[number]
        seen.outcome, seen.took_ms = outcome, 1000 * (self._clock.now - seen.arrival.at)
        seen.receipt = receipt or {}
        self._left -= 1
        if outcome in ("ok", "expired"):
            seconds = (seen.foreseen_ms / 1000, seen.took_ms / 1000, seen.deadline_ms / 1000)
            self._forecasts(seen).came_true(*seconds, given_up=outcome == "expired")

    def _forecasts(self, seen: Seen) -> Forecasts:
        return self._flows.of(self._info.name, seen.arrival.priority, seen.deadline_ms / 1000).forecasts

    # lanes

    def _call(self) -> None:
        """An entry wakes every worker that waits for one; who has the fewest rows comes first (of some, for speed)."""
        if self._waiting:
            some = self._draw.sample(range(len(self._waiting)), min(SOME, len(self._waiting)))
            chosen = max(some, key=lambda i: self._waiting[i].room)
            self._waiting[chosen], self._waiting[-1] = self._waiting[-1], self._waiting[chosen]
            worker = self._waiting.pop()
            worker.waiting = False
            self._look_soon(worker, LOOK_S + step_back_s(worker.engine) * (len(self.workers) > 1))

    def _look_soon(self, worker: Worker, seconds: float) -> None:
        worker.looking = True
        self._after(seconds, self._look, worker)

    def _look(self, worker: Worker) -> None:
        """Take what fits."""
        worker.looking = False
        worker.looks += 1
        if worker.waiting:
            return
        now, engine = self._now_ms(), worker.engine
        taken = self._queue.take(now, worker.room, self._terms.slots)
        for entry in taken.ended:
            self._end(entry.number, "expired")
        for entry in taken.jobs:
            engine.offer(self._delivery(worker, entry, now))
            worker.room = max(0, worker.room - entry.rows)
        worker.seen, engine.pressed = worker.room, taken.full or not worker.room
        self._tell(worker)
        if taken.jobs and not worker.ticking:
            self._tick(worker)
        if engine.pressed:
            self._after(WAIT_S, self._look_again, worker, worker.looks)
        else:
            worker.waiting = True
            self._waiting.append(worker)
        if len(self._queue):
            self._call()

    def _look_again(self, worker: Worker, looks: int) -> None:
        if worker.looks == looks and not worker.looking:
            self._look(worker)

    def _tell(self, worker: Worker) -> None:
        """The queue as a take sees it; whoever waits is woken by the same entry and takes nothing, but sees it too."""
        asked, workers = self._queue.asked, len(self.workers)
        self._view = (self._clock.now, Queue(0, asked, workers))
        worker.told, worker.engine.gears.queue = self._view
        if worker.engine.pressed:
            worker.engine.gears.queue = Queue(self.backlog, asked, workers)

    def _remind(self, worker: Worker) -> None:
        """What a worker that waits has seen meanwhile: it looks with all others, and each second."""
        if self._clock.now - worker.told > WAIT_S:
            self._tell(worker)
        elif self._view[0] > worker.told:
            worker.told, worker.engine.gears.queue = self._view

    def _delivery(self, worker: Worker, entry: Entry, now: int) -> Delivery:
        name = str(entry.number)
        worker.held[name] = entry
        job = GenerateJob(id=name, cost=entry.cost, work=entry.work)
        return Delivery(job, name, name, 1, entry.submitted_ms, entry.deadline_ms, now)

    def _announce(self, worker: Worker, again: bool) -> None:
        """Say what drains: every two seconds, and soon after that becomes known."""
        self._queue.announce(worker.number, worker.engine.admission_rate())
        if again:
            self._after(ANNOUNCE_S, self._announce, worker, True)

    # engines

    def _tick(self, worker: Worker) -> None:
        """Run a tick, from now to when its time has passed."""
        if worker.waiting:
            self._remind(worker)
        now, before = self._clock.now, worker.engine.gears.rung
        worker.ticking = True
        tick = worker.engine.tick()
        self._at(self._clock.now, self._ticked, worker, tick)
        self._clock.now = now
        worker.changes += worker.engine.gears.rung != before

    def _ticked(self, worker: Worker, tick: Tick) -> None:
        worker.ticking = False
        worker.room = worker.engine.free_rows()
        if tick.finished:
            self._after(ANSWER_S, self._answer, worker, tick.finished)
        if not worker.engine.idle():
            self._tick(worker)
        if worker.room > worker.seen and not worker.waiting and not worker.looking:
            self._look_soon(worker, LOOK_S)
        if self._queue.pressed[worker.number] <= 0 < worker.engine.admission_rate():
            self._after(NEWS_S * self._draw.random(), self._announce, worker, False)

    def _answer(self, worker: Worker, over: Sequence[Finished]) -> None:
        for done in over:
            entry = worker.held.pop(done.delivery.attempt)
            self._queue.close(entry)
            self._end(entry.number, done.outcome, done.receipt)

    # the rest

    def _sweep(self) -> None:
        """What a gateway does with jobs that nobody took."""
        for entry in self._queue.expire(self._now_ms() - GRACE_MS):
            self._end(entry.number, "expired")
        self._after(SWEEP_S, self._sweep)

    def _sample(self) -> None:
        rungs = sum(worker.engine.gears.rung for worker in self.workers)
        self.samples.append((self._clock.now, rungs / len(self.workers), self.backlog))
        self._after(1.0, self._sample)
