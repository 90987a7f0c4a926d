"""One model's loop: schedule, admit, step, collect. Knows nothing of Redis or tensors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.api import StepStats, Task, UserError
from service.errors import BadRequest, DeadlineExceeded, JobFailed
from service.metrics import WorkerMetrics
from service.protocol import Delivery, Failure, Outcome
from service.worker.rate import DrainRate
from service.worker.scheduler import Admission, JobRun, Plan, Scheduler

MESSAGE_LIMIT = 300
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A job that needs nothing more from the engine: what it made, or why it did not."""

    delivery: Delivery
    outcome: Outcome
    rows: tuple[Any, ...] = ()
    receipt: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    queue_s: float = 0.0
    run_s: float = 0.0


class Engine:
    """A Task and its Scheduler. `tick` belongs to one thread; everything else may be called from any."""

    def __init__(
        self, task: Task[Any, Any], metrics: WorkerMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.task, self.name, self.capacity = task, task.info.name, task.capacity
        self.rate = DrainRate()
        self.ticks = 0
        self._metrics, self._clock = metrics, clock
        self._scheduler = Scheduler(task.capacity)
        self._lock = threading.Lock()
        self._inbox: list[tuple[Delivery, float]] = []
        self._withdrawn: set[str] = set()
        self._publish()

    def offer(self, delivery: Delivery) -> None:
        """Hand over a job; it enters at the next tick."""
        with self._lock:
            self._inbox.append((delivery, self._clock() * 1000))
            self._idle = False

    def withdraw(self, attempts: Iterable[str]) -> None:
        """Let these attempts go at the next tick, unanswered: somebody else has them."""
        with self._lock:
            self._withdrawn.update(attempts)

    def free_rows(self) -> int:
        """Rows that may be taken now: free slots less what the inbox holds."""
        with self._lock:
            return max(0, self._free - sum(d.job.work.rows for d, _ in self._inbox))

    def idle(self) -> bool:
        """Whether nothing is in hand here."""
        with self._lock:
            return self._idle

    def tick(self) -> list[Finished]:
        """Move every row by one evaluation, new rows included; returns the jobs that are over."""
        started = self._clock()
        self._receive()
        plan = self._scheduler.schedule(started * 1000)
        over = [self._expired(job, started) for job in plan.expired]
        for admission in plan.admissions:
            over += self._admit(admission)
        batch = self._scheduler.batch()
        jobs = len(self._scheduler.owners(batch))
        stats, failed = self._step(batch)
        done, cost = self._collect()
        over += failed + done
        self._publish()
        if stats is None:
            stats = _admission_stats(plan)
            jobs = len(plan.admissions)
        if stats.rows:
            seconds = self._clock() - started
            self.rate.add(cost, seconds)
            self._metrics.ticked(self.name, seconds, stats, jobs)
        self.ticks += 1
        return over

    def _receive(self) -> None:
        with self._lock:
            inbox, self._inbox = self._inbox, []
            withdrawn, self._withdrawn = self._withdrawn, set()
            for delivery, offered_ms in inbox:
                self._scheduler.add(delivery, offered_ms)
            for attempt in withdrawn:
                self._scheduler.drop(attempt)
            self._free = self._scheduler.free_rows()
        for delivery, _ in inbox:
            if delivery.deliveries > 1:
                self._metrics.redeliveries.labels(self.name).inc()

    def _publish(self) -> None:
        with self._lock:
            self._free = self._scheduler.free_rows()
            self._idle = not self._inbox and not self._scheduler.jobs
        busy = self._scheduler.busy_slots
        self._metrics.slots.labels(self.name, "busy").set(busy)
        self._metrics.slots.labels(self.name, "free").set(self.capacity - busy)

    def _admit(self, admission: Admission) -> list[Finished]:
        job = admission.job
        if job.admitted_ms is not None and 0 in admission.indices:
            self._metrics.queue_wait.labels(self.name).observe(_queue_s(job, job.admitted_ms))
        try:
            evaluations = self.task.admit(job.delivery.job.work, admission.indices, admission.slots)
            self._scheduler.admitted(admission, evaluations)
        except Exception as error:
            return self._fail([job], error, "admit")
        return []

    def _step(self, batch: Sequence[int]) -> tuple[StepStats | None, list[Finished]]:
        if not batch:
            return None, []
        try:
            stats = self.task.step(batch)
        except Exception as error:
            return None, self._fail(self._scheduler.owners(batch), error, "step")
        self._scheduler.stepped([slot for slot in batch if slot not in stats.waiting], stats.finished)
        return stats, []

    def _collect(self) -> tuple[list[Finished], float]:
        over: list[Finished] = []
        cost = 0.0
        for slots in self._scheduler.finished().values():
            [job] = self._scheduler.owners(slots)
            try:
                outputs = self.task.collect(slots)
                complete = self._scheduler.collected(slots, outputs)
                over += [self._completed(job) for job in complete]
            except Exception as error:
                over += self._fail([job], error, "collect")
            else:
                cost += job.delivery.job.cost * len(slots) / job.delivery.job.work.rows
        return over, cost

    def _completed(self, job: JobRun) -> Finished:
        rows = tuple(job.rows())
        receipt = self.task.receipt(job.delivery.job.work, rows)
        queue_s, run_s = self._times(job, self._clock())
        self._metrics.run.labels(self.name).observe(run_s)
        return Finished(job.delivery, "ok", rows=rows, receipt=receipt, queue_s=queue_s, run_s=run_s)

    def _expired(self, job: JobRun, now: float) -> Finished:
        queue_s, run_s = self._times(job, now)
        where = "while it waited" if job.admitted_ms is None else "while it ran"
        failure = Failure(DeadlineExceeded.code, f"the deadline passed {where}", DeadlineExceeded.retryable)
        return Finished(job.delivery, "expired", failure=failure, queue_s=queue_s, run_s=run_s)

    def _fail(self, jobs: Sequence[JobRun], error: Exception, verb: str) -> list[Finished]:
        where = {"model": self.name, "verb": verb, "jobs": [_id(job) for job in jobs]}
        if isinstance(error, UserError):
            log.info("job refused", extra=where | {"reason": str(error)})
        else:
            log.exception("task failed", extra=where)
        failure = _failure(error, verb)
        over = []
        for job in jobs:
            self._scheduler.drop(job.attempt)
            queue_s, run_s = self._times(job, self._clock())
            over.append(Finished(job.delivery, "failed", failure=failure, queue_s=queue_s, run_s=run_s))
        return over

    def _times(self, job: JobRun, now: float) -> tuple[float, float]:
        """Seconds queued (before this worker took it included) and seconds running."""
        admitted = now * 1000 if job.admitted_ms is None else job.admitted_ms
        return _queue_s(job, admitted), max(0.0, now - admitted / 1000)


def _queue_s(job: JobRun, admitted_ms: float) -> float:
    before = job.delivery.taken_ms - job.delivery.submitted_ms
    return max(0.0, (before + admitted_ms - job.added_ms) / 1000)


def _id(job: JobRun) -> str:
    return job.delivery.job.id


def _failure(error: Exception, verb: str) -> Failure:
    if isinstance(error, UserError):
        return Failure(BadRequest.code, str(error), BadRequest.retryable, error.field)
    message = f"{verb}: {type(error).__name__}: {error}"[:MESSAGE_LIMIT]
    return Failure(JobFailed.code, message, JobFailed.retryable)


def _admission_stats(plan: Plan) -> StepStats:
    """A tick that only admitted worked on the rows it admitted: one-call methods never step."""
    return StepStats(rows=sum(len(admission.slots) for admission in plan.admissions))
