"""Gears at work: what the controller sees of an engine's jobs, and which gear each of them runs in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from models.api import GenerateWork, ModelInfo, StepStats
from service.ladders import Work, moved, rung_at, rungs_of, units
from service.protocol import Delivery
from service.worker.gears import Arrivals, Governor, Queue, Row, Strain, TickTime, Usual, capacity, strain
from service.worker.scheduler import Admission, JobRun

LOOK_S = 0.01
Means = tuple[tuple[float, ...], ...]
AT_REST = Strain(0.0, 0.0)


@dataclass(frozen=True)
class GearNews:
    """The rung and its strain now; changes by reason, and jobs held by their own floor, since the last news."""

    rung: int
    strain: Strain
    shifts: Counter[str]
    floor_hits: int


class Shifting:
    """The gears of one model in one engine. `queue` is set by whoever takes jobs, from any thread.

    Args:
        points: (units, milliseconds) of a tick, measured before there was work; none: learned from the ticks alone.
        adapt: let the load decide; False: the best rung of each job.
    """

    def __init__(
        self, info: ModelInfo, slots: int, points: Sequence[tuple[float, float]] = (), adapt: bool = True
    ) -> None:
        self.rungs = (rungs_of(info) or ("",))[: None if adapt else 1]
        self.queue = Queue()
        self.time = TickTime(points)
        self._strain, self._shifts, self._floor_hits = AT_REST, Counter[str](), 0
        self._info, self._slots, self._profiled = info, slots, bool(points)
        self._governor, self._usual, self._arrivals = Governor(len(self.rungs)), Usual(len(self.rungs)), Arrivals()
        self._looked, self._unmeasured_ms, self._why = -math.inf, 0.0, "load"
        self._means = lru_cache(256)(self._mean_units)

    @property
    def rung(self) -> int:
        """Where work with the whole ladder is now; 0 is the best."""
        return self._governor.rung

    def received(self, delivery: Delivery) -> float:
        """A job has come; the share of its cost that it takes in the cheapest gear that it allows."""
        job, means = delivery.job, self._means(_shape(delivery.job.work))
        if not means:  # a gear of another version: the task says so
            return 1.0
        budget = delivery.deadline_ms - delivery.submitted_ms
        possible = budget >= len(means) * self.time.ms(means[0][-1])
        self._usual.saw(job.work.rows, len(means), means[0], job.cost / job.work.rows, budget if possible else None)
        return means[0][-1] / means[0][0] if means[0][0] else 1.0

    def decide(
        self, now_s: float, idle_s: float, jobs: Sequence[JobRun], left: Callable[[int], int | None]
    ) -> list[tuple[JobRun, Any]]:
        """Look at the work at hand; the running jobs that change gear, with their work from now on.

        Args:
            idle_s: time without any work until this tick.
            left: evaluations to come for the row of a slot; None for one that is about to begin.
        """
        if len(self.rungs) == 1 or now_s - self._looked < LOOK_S:
            return []
        self._looked = now_s
        self._arrivals.seen(now_s, self.queue)
        rows = [row for job in jobs for row in self._rows(job, now_s * 1000, left)]
        held = sum(job.delivery.job.cost for job in jobs)
        queued = self.queue.backlog / self.queue.workers - held
        rates = [self.rate(rung) for rung in range(len(self.rungs))]
        strains = strain(rows, queued, held, self._usual.budget_ms, self.time, rates)
        loads = [self._arrivals.per_second() / rate if rate > 0 else 0.0 for rate in rates]
        before, rested = self.rung, self._governor.rested(idle_s)
        self._governor.decide(now_s, [max(one.running, one.waiting) for one in strains], loads, idle_s)
        self._strain = strains[self.rung]
        if self.rung > before:
            self._why = "deadline" if strains[before].running > max(1.0, strains[before].waiting) else "load"
            self._shifts[self._why] += 1
        elif self.rung < before:
            self._shifts["idle" if rested < before else "calm"] += 1
        return [(job, self.work(job)) for job in jobs if job.running and job.rung and job.rung != self._rung_of(job)]

    def news(self, idle_s: float = 0.0) -> GearNews:
        """What there is to tell after a tick, or after so long without work."""
        strain = AT_REST if idle_s else self._strain
        told = GearNews(self._governor.rested(idle_s), strain, self._shifts, self._floor_hits)
        self._shifts, self._floor_hits = Counter(), 0
        return told

    def work(self, job: JobRun) -> Any:
        """The job's work in the gear that it runs in from now on."""
        work = job.delivery.job.work
        if not work.ladder:
            return work
        job.rung = self._rung_of(job)
        if job.rung != work.ladder[0] and not job.why:
            job.why = self._why
        if not job.floored and job.rung in self.rungs[: self.rung] and job.rung == work.ladder[-1]:
            job.floored = True
            self._floor_hits += 1
        return moved(work, job.rung)

    def receipt(self, job: JobRun, receipt: dict[str, Any]) -> dict[str, Any]:
        """A job's receipt with what it says of gears: `requested`, and whether and why less was served."""
        ladder = job.delivery.job.work.ladder
        if not ladder:
            return receipt | {"downgraded": False}
        served = receipt["gear"] if self._info.task == "generate" else job.rung
        told = {"requested": "auto", "downgraded": served != ladder[0]}
        return receipt | told | ({"why": job.why or "load"} if served != ladder[0] else {})

    def rate(self, rung: int) -> float:
        """Cost per second of the usual work in `rung`; 0 while that is not known."""
        return capacity(self._usual, self.time, self._slots, rung)

    def admission_rate(self) -> float:
        """Cost per second in the cheapest gears that the usual work allows; 0 where ticks were not measured before."""
        return self.rate(-1) if self._profiled else 0.0

    def ticked(self, ms: float, stats: StepStats | None, admissions: Sequence[Admission]) -> None:
        """A tick took so long, since the one before. Time without a unit of work belongs to the next that has some."""
        if self._info.task == "generate":
            done = float(stats.layer_evals) if stats else 0.0
        else:
            done = sum(len(one.slots) * units(self.work(one.job), self._info)[0] for one in admissions)
        self._unmeasured_ms += ms
        if done:
            self.time.measured(done, self._unmeasured_ms)
            self._unmeasured_ms = 0.0

    def _rung_of(self, job: JobRun) -> str:
        """Classifications keep the method that their first images were admitted with."""
        if job.rung and self._info.task == "classify":
            return job.rung
        return rung_at(job.delivery.job.work.ladder, self.rungs, self.rung) if job.delivery.job.work.ladder else ""

    def _rows(self, job: JobRun, now_ms: float, left: Callable[[int], int | None]) -> Iterable[Row]:
        """Running rows, and what a job has to run after them."""
        means = job.means = job.means or self._means(_shape(job.delivery.job.work))
        if not job.running or not means:
            return
        after = -(-len(job.waiting) // self._slots) * len(means)
        for slot in job.running:
            to_come = left(slot)
            if to_come := len(means) if to_come is None else min(to_come, len(means)):
                yield Row(to_come + after, job.deadline_ms - now_ms, means[len(means) - to_come])

    def _mean_units(self, work: Work) -> Means:
        """Mean units of the evaluations from each one on, by rung."""
        by_rung = []
        for level in range(len(self.rungs)):
            here = moved(work, rung_at(work.ladder, self.rungs, level)) if work.ladder else work
            sums = accumulate(reversed(units(here, self._info)))
            by_rung.append([total / (n + 1) for n, total in enumerate(sums)][::-1])
        return tuple(zip(*by_rung, strict=True))


def _shape(work: Work) -> Work:
    """What of a job decides its units."""
    if isinstance(work, GenerateWork):
        return replace(work, seeds=(), labels=())
    return replace(work, images=())
