"""Which rows run where: slots, jobs in flight and their deadlines. Pure: no torch, no Redis, no clock of its own.

One tick of the engine: `schedule` -> `admitted` for each admission -> `batch` -> `stepped` -> `collected`.
Jobs are known by their attempt token, so a redelivered entry is another job. Times are milliseconds of
one monotonic clock, the caller's.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.api import ClassifyWork
from service.protocol import Delivery
from service.worker.rate import Pace

UNMEASURED = Pace()
MARGIN = 1.25  # how much faster than the best of the recent ticks a tick may be


@dataclass
class JobRun:
    """A job in flight.

    Attributes:
        deadline_ms: on the scheduler's clock.
        waiting: images that have no slot yet, in order.
        evaluations: per row: known before it runs (0 where unknown), then the most that any row was admitted with.
        running: slot -> image.
        outputs: image -> its collected output.
        cost: per row and evaluation, admission counted as one.
        rung, why: what it runs in (service/ladders.py), empty for what it named, and why that is not the best.
        floored: whether its own floor ever kept it from the rung that its model was at.
        means: units of its evaluations (worker/shifting.py).
        least: share of its cost that it takes in the cheapest gear that it allows.
        saved_tick, told_ms: when its rows were last saved and its progress told (worker/progress.py).
    """

    delivery: Delivery
    deadline_ms: float
    added_ms: float
    waiting: deque[int]
    evaluations: int = 0
    running: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    admitted_ms: float | None = None
    cost: float = 0.0
    rung: str = ""
    why: str = ""
    least: float = 1.0
    floored: bool = False
    means: tuple[tuple[float, ...], ...] = ()
    saved_tick: int | None = None
    told_ms: float = -math.inf

    @property
    def attempt(self) -> str:
        """The job's name here."""
        return self.delivery.attempt

    @property
    def unfinished(self) -> int:
        """Rows that still need a slot or hold one."""
        return len(self.waiting) + len(self.running)

    def rows(self) -> list[Any]:
        """Outputs in the order of the job's images."""
        return [self.outputs[index] for index in sorted(self.outputs)]


@dataclass(frozen=True)
class Admission:
    """Images `indices` of a job go to `slots`."""

    job: JobRun
    indices: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What this tick admits, and which jobs have left already: out of time, or sure to be before they end."""

    admissions: tuple[Admission, ...]
    expired: tuple[JobRun, ...]
    hopeless: tuple[JobRun, ...] = ()


class Scheduler:
    """Slots of one model, and the jobs whose rows are in them or wait for them.

    Attributes:
        drained: cost of all evaluations so far; what a row did not need counts when it ends.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.drained = 0.0
        self._free = list(range(capacity))
        self._jobs: dict[str, JobRun] = {}
        self._owner: dict[int, JobRun] = {}
        self._left: dict[int, int] = {}

    @property
    def jobs(self) -> list[JobRun]:
        """Jobs in flight, in the order of their arrival."""
        return list(self._jobs.values())

    @property
    def busy_slots(self) -> int:
        """Slots that hold a row."""
        return len(self._owner)

    def free_rows(self, ending: int = 0) -> int:
        """Rows that could enter now, or once `ending` rows have left: slots neither held nor spoken for by waiting
        rows; none beside a solo job."""
        spoken = -ending
        for job in self._jobs.values():
            if job.delivery.solo:
                return 0
            spoken += job.unfinished
        return max(0, self.capacity - spoken)

    def ending(self) -> int:
        """Rows in slots that have one evaluation to come at most."""
        return sum(left <= 1 for left in self._left.values())

    def add(self, delivery: Delivery, now_ms: float, evaluations: int = 0, least: float = 1.0) -> None:
        """Take charge of a job; its deadline is carried over from Redis TIME to the clock of `now_ms`.

        Every row needs at least `evaluations`, and of the job's cost at least the share `least`.
        """
        deadline = now_ms + delivery.deadline_ms - delivery.taken_ms
        waiting = deque(range(delivery.job.work.rows))
        self._jobs[delivery.attempt] = JobRun(delivery, deadline, now_ms, waiting, evaluations, least=least)

    def schedule(self, now_ms: float, pace: Pace = UNMEASURED) -> Plan:
        """Let jobs go that are late or will be, then give free slots to waiting rows, least slack first.

        A job larger than the pool enters row by row as slots free; a solo job enters an empty pool and keeps it.
        """
        jobs = self._jobs.values()
        expired = tuple(job for job in jobs if job.deadline_ms <= now_ms)
        for job in expired:
            self.drop(job.attempt)
        waiting = [job for job in jobs if job.waiting]
        hopeless = tuple(job for job in waiting if self._hopeless(job, now_ms, pace))
        for job in hopeless:
            self.drop(job.attempt)
            waiting.remove(job)
        admissions = []
        for job in sorted(waiting, key=lambda job: self.slack_ms(job, now_ms, pace)):
            if self._free and self._may_enter(job):
                admissions.append(self._place(job, now_ms))
        return Plan(tuple(admissions), expired, hopeless)

    def slack_ms(self, job: JobRun, now_ms: float, pace: Pace) -> float:
        """Time to spare for a job that waits: until its deadline, less what its rows to come will take."""
        return job.deadline_ms - now_ms - self._ticks(job, len(job.waiting)) * pace.ms_per_tick

    def _ticks(self, job: JobRun, rows: int) -> int:
        """Ticks that so many rows of a job need, a pool at a time."""
        return job.evaluations * -(-rows // self.capacity)

    def _hopeless(self, job: JobRun, now_ms: float, pace: Pace) -> bool:
        """Whether a job that has cost nothing yet would be late for sure, started now.

        Its ticks do at least its own work and that of the rows beside it, and none does more for its time than the
        best of late. What earlier attempts have saved counts as done.
        """
        rows, fresh = job.delivery.job.work.rows, job.delivery.job.work.rows - len(job.delivery.states)
        if job.admitted_ms is not None or not job.evaluations or fresh <= 0:
            return False
        ticks = self._ticks(job, fresh)
        beside = sum(self._owner[slot].cost * min(left, ticks) for slot, left in self._left.items())
        work = job.least * (job.delivery.job.cost * fresh / rows + beside)
        return work * pace.ms_per_cost > (job.deadline_ms - now_ms) * MARGIN

    def _may_enter(self, job: JobRun) -> bool:
        if job.delivery.solo:
            return len(job.running) == len(self._owner)
        return not any(owner.delivery.solo for owner in self._owner.values())

    def _place(self, job: JobRun, now_ms: float) -> Admission:
        count = min(len(job.waiting), len(self._free))
        indices = tuple(job.waiting.popleft() for _ in range(count))
        slots = tuple(heapq.heappop(self._free) for _ in range(count))
        for index, slot in zip(indices, slots, strict=True):
            job.running[slot] = index
            self._owner[slot] = job
        if job.admitted_ms is None:
            job.admitted_ms = now_ms
        return Admission(job, indices, slots)

    def admitted(self, job: JobRun, slots: Sequence[int], evaluations: Sequence[int]) -> None:
        """Say how many evaluations rows need at most from here; 0 is finished at once."""
        self._left.update(zip(slots, evaluations, strict=True))
        job.evaluations = max(job.evaluations, *evaluations)
        job.cost = job.delivery.job.cost / job.delivery.job.work.rows / (job.evaluations + 1)
        self.drained += job.cost * len(slots)

    def batch(self) -> list[int]:
        """Slots to step: every row with evaluations to come."""
        return sorted(slot for slot, left in self._left.items() if left > 0)

    def stepped(self, slots: Iterable[int], finished: Container[int] = ()) -> None:
        """Each of `slots` had one evaluation; those of them in `finished` need no more."""
        for slot in slots:
            before = self._left[slot]
            left = self._left[slot] = 0 if slot in finished else before - 1
            self.drained += self._owner[slot].cost * (before - left)

    def left(self, slot: int) -> int | None:
        """Evaluations to come for the row in `slot`, at most; None for one that was placed but not admitted."""
        return self._left.get(slot)

    def progress(self, job: JobRun) -> tuple[int, int]:
        """Evaluations that a job's rows have had, and will have had at most."""
        to_come = len(job.waiting) * job.evaluations + sum(self._left.get(slot, 0) for slot in job.running)
        planned = job.evaluations * job.delivery.job.work.rows
        return planned - to_come, planned

    def finished(self) -> dict[str, list[int]]:
        """Slots whose rows are ready to be collected, by job."""
        ready: dict[str, list[int]] = {}
        for slot in sorted(slot for slot, left in self._left.items() if left <= 0):
            ready.setdefault(self._owner[slot].attempt, []).append(slot)
        return ready

    def collected(self, slots: Sequence[int], outputs: Sequence[Any]) -> list[JobRun]:
        """Keep rows' outputs and free their slots; returns the jobs that this completes, which leave."""
        complete = []
        for slot, output in zip(slots, outputs, strict=True):
            job = self._owner[slot]
            job.outputs[job.running[slot]] = output
            self._release(slot)
            if not job.unfinished:
                complete.append(self._jobs.pop(job.attempt))
        return complete

    def holds(self, slot: int) -> bool:
        """Whether a row is in `slot`."""
        return slot in self._owner

    def owners(self, slots: Iterable[int]) -> list[JobRun]:
        """The jobs whose rows are in `slots`, each once."""
        return list({self._owner[slot].attempt: self._owner[slot] for slot in slots}.values())

    def drop(self, attempt: str) -> JobRun | None:
        """Let a job go and free its slots; None when it is not here."""
        job = self._jobs.pop(attempt, None)
        if job is not None:
            for slot in list(job.running):
                self._release(slot)
        return job

    def _release(self, slot: int) -> None:
        del self._owner[slot].running[slot]
        del self._owner[slot]
        self._left.pop(slot, None)
        heapq.heappush(self._free, slot)


def evaluations_of(delivery: Delivery) -> int:
    """Evaluations that each row needs at least, known before it runs; 0 for a classification, which may end early."""
    work = delivery.job.work
    if isinstance(work, ClassifyWork):
        return 0
    return 2 * work.steps - 1 if work.solver == "heun" else work.steps
