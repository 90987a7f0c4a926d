"""Which rows run where: slots, jobs in flight and their deadlines. Pure: no torch, no Redis, no clock of its own.

One tick of the engine: `schedule` -> `admitted` for each admission -> `batch` -> `stepped` -> `collected`.
Jobs are known by their attempt token, so a redelivered entry is another job. Times are milliseconds of
one monotonic clock, the caller's.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.protocol import Delivery


@dataclass
class JobRun:
    """A job in flight.

    Attributes:
        deadline_ms: on the scheduler's clock.
        waiting: images that have no slot yet, in order.
        running: slot -> image.
        outputs: image -> its collected output.
    """

    delivery: Delivery
    deadline_ms: float
    added_ms: float
    waiting: deque[int]
    running: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    admitted_ms: float | None = None

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
    """What this tick admits, and which jobs ran out of time and have left already."""

    admissions: tuple[Admission, ...]
    expired: tuple[JobRun, ...]


class Scheduler:
    """Slots of one model, and the jobs whose rows are in them or wait for them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity))
        self._jobs: dict[str, JobRun] = {}
        self._owner: dict[int, JobRun] = {}
        self._left: dict[int, int] = {}

    @property
    def jobs(self) -> int:
        """Jobs in flight."""
        return len(self._jobs)

    @property
    def busy_slots(self) -> int:
        """Slots that hold a row."""
        return len(self._owner)

    def free_rows(self) -> int:
        """Rows that could enter now: slots neither held nor spoken for by waiting rows."""
        return max(0, self.capacity - sum(job.unfinished for job in self._jobs.values()))

    def add(self, delivery: Delivery, now_ms: float) -> None:
        """Take charge of a job; its deadline is carried over from Redis TIME to the clock of `now_ms`."""
        deadline = now_ms + delivery.deadline_ms - delivery.taken_ms
        waiting = deque(range(delivery.job.work.rows))
        self._jobs[delivery.attempt] = JobRun(delivery, deadline, now_ms, waiting)

    def schedule(self, now_ms: float) -> Plan:
        """Let expired jobs go, then give free slots to waiting rows, least slack first.

        A job larger than the pool enters row by row as slots free.
        """
        expired = tuple(job for job in self._jobs.values() if job.deadline_ms <= now_ms)
        for job in expired:
            self.drop(job.attempt)
        admissions = []
        for job in sorted(self._jobs.values(), key=lambda job: job.deadline_ms):
            if not self._free:
                break
            if job.waiting:
                admissions.append(self._place(job, now_ms))
        return Plan(tuple(admissions), expired)

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

    def admitted(self, admission: Admission, evaluations: Sequence[int]) -> None:
        """Say how many evaluations each row of an admission needs at most; 0 is finished at once."""
        self._left.update(zip(admission.slots, evaluations, strict=True))

    def batch(self) -> list[int]:
        """Slots to step: every row with evaluations to come."""
        return sorted(slot for slot, left in self._left.items() if left > 0)

    def stepped(self, slots: Iterable[int], finished: Container[int] = ()) -> None:
        """Each of `slots` had one evaluation; those of them in `finished` need no more."""
        for slot in slots:
            self._left[slot] = 0 if slot in finished else self._left[slot] - 1

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
