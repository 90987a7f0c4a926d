"""One model's loop: schedule, admit, step, collect. Knows nothing of Redis or tensors."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.api import StepStats, Task, UserError
from service.metrics import WorkerMetrics
from service.protocol import Delivery
from service.worker.outcomes import Finished, failure_of, lateness
from service.worker.progress import Progress, Reporter
from service.worker.rate import DrainRate
from service.worker.scheduler import Admission, JobRun, Plan, Scheduler, evaluations_of
from service.worker.shifting import Shifting
from service.worker.splitting import Splitter, is_lost, merged

__all__ = ["Engine", "Finished", "Progress", "Tick"]
REFILL_S = 0.05
LATELY = 32  # ticks
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """What a tick has to tell: jobs that are over, jobs with news, and jobs let go with their states (`suspend`)."""

    finished: list[Finished]
    progress: list[Progress] = field(default_factory=list)
    suspended: list[Progress] = field(default_factory=list)


class Engine:
    """A Task and its Scheduler. `tick` belongs to one thread; everything else may be called from any.

    `pressed` is set by whoever takes jobs: the last take filled the slots, or left work behind.
    `points` and `adapt` as in worker/shifting.py.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        metrics: WorkerMetrics,
        clock: Callable[[], float] = time.monotonic,
        checkpoint_ticks: int = 16,
        progress_s: float = 0.5,
        points: Sequence[tuple[float, float]] = (),
        adapt: bool = True,
    ) -> None:
        self.task, self.name, self.capacity = task, task.info.name, task.capacity
        self.rate = DrainRate()
        self.gears = Shifting(task.info, task.capacity, points, adapt)
        self.ticks = 0
        self._metrics, self._clock = metrics, clock
        self._slots = {state: metrics.slots.labels(self.name, state) for state in ("busy", "free")}
        self._queue_wait, self._run = metrics.queue_wait.labels(self.name), metrics.run.labels(self.name)
        self._slack = metrics.deadline_slack.labels(self.name)
        self._scheduler = Scheduler(task.capacity)
        self._reporter = Reporter(task, self._scheduler, checkpoint_ticks, progress_s)
        self._splitter = Splitter(task.capacity, lambda reason: metrics.batch_splits.labels(self.name, reason).inc())
        self._lock = threading.Lock()
        self._inbox: list[tuple[Delivery, float]] = []
        self._withdrawn: set[str] = set()
        self._suspending = False
        self._had_work_until: float | None = None
        self._ended = clock()
        self._began: float | None = None
        self._waits, self._ended_rows = False, deque[int](maxlen=LATELY)
        self._rested = True
        self.pressed = False
        self._publish()

    def offer(self, *deliveries: Delivery) -> None:
        """Hand over jobs; they enter at the next tick, none before the others."""
        with self._lock:
            self._inbox += [(delivery, self._clock() * 1000) for delivery in deliveries]
            self._idle = False

    def withdraw(self, attempts: Iterable[str]) -> None:
        """Let these attempts go at the next tick, unanswered: somebody else has them."""
        with self._lock:
            self._withdrawn.update(attempts)

    def suspend(self) -> None:
        """At the next tick save every job's running rows and let all jobs go, unanswered."""
        with self._lock:
            self._suspending = True

    def free_rows(self) -> int:
        """Rows that may be taken now: slots that are free, or will be when the running tick ends, less what the inbox
        holds; none beside a job that runs alone."""
        with self._lock:
            if any(delivery.solo for delivery, _ in self._inbox):
                return 0
            return max(0, self._free - sum(d.job.work.rows for d, _ in self._inbox))

    def until_next_s(self) -> float:
        """Seconds until the tick that runs, or is about to, should end, by the mean of the last ones; 0 when there is
        none, or it is late."""
        if self.idle():
            return 0.0
        began, now = self._began, self._clock()
        return max(0.0, (now if began is None else began) + self.rate.pace().ms_per_tick / 1000 - now)

    def idle(self) -> bool:
        """Whether nothing is in hand here."""
        with self._lock:
            return self._idle

    def tick(self) -> Tick:
        """Move every row by one evaluation, new rows included; returns what there is to tell."""
        started, drained = self._clock(), self._scheduler.drained
        self._began = started
        self.ticks += 1
        self._rested = not self._scheduler.jobs
        if self._receive():
            self._began = None
            return Tick([], suspended=self._let_go())
        plan = self._scheduler.schedule(started * 1000, self.rate.pace())
        self._shift(started)
        over = [self._late(job, started) for job in plan.expired]
        over += [self._late(job, started, "hopeless") for job in plan.hopeless]
        for admission in plan.admissions:
            over += self._admit(admission, started * 1000)
        batch = self._scheduler.batch()
        jobs = len(self._scheduler.owners(batch))
        with self._lock:
            self._free = self._scheduler.free_rows(self._ending())
        stats, failed = self._step(batch)
        busy = self._scheduler.busy_slots
        over += failed + self._collect()
        self._waits |= bool(stats and stats.waiting)
        self._ended_rows.append(busy - self._scheduler.busy_slots)
        ended = self._clock()
        news = self._reporter.due(self.ticks, ended * 1000)
        if batch or plan.admissions:
            self._measure(started, ended, self._scheduler.drained - drained, stats, plan)
        if stats is None:
            stats, jobs = _admission_stats(plan), len(plan.admissions)
        if stats.rows:
            self._metrics.ticked(self.name, ended - started, stats, jobs)
        self._tell_gears()
        self._publish()
        self._had_work_until = None if self._idle and not self.pressed else ended
        self._ended, self._began = ended, None
        return Tick(over, news)

    def _ending(self) -> int:
        """Rows that end with this tick; of a task whose rows wait for each other, at most as many as did lately."""
        ending = self._scheduler.ending()
        return min(ending, max(self._ended_rows, default=0)) if self._waits else ending

    def _measure(self, started: float, ended: float, cost: float, stats: StepStats | None, plan: Plan) -> None:
        """Time since the last tick counts while there was work; under pressure, also while the pool was refilled."""
        since = started if self._had_work_until is None else self._had_work_until
        if self._rested and started - since > REFILL_S:
            since = started
        if stats is None:
            self.rate.add(cost, ended - since)
        else:
            self.rate.ticked(cost, ended - since, ended - started, self.pressed)
        self.gears.ticked((ended - since) * 1000, stats, plan.admissions)

    def _shift(self, now: float) -> None:
        """Look at the load; rows that run change gear from their next evaluation on."""
        idle_s = now - self._ended if self._rested else 0.0
        for job, work in self.gears.decide(now, idle_s, self._scheduler.jobs, self._scheduler.left):
            slots = [slot for slot in job.running if self._scheduler.left(slot) is not None]
            self.task.shift(work, slots)
            self._metrics.rows_shifted.labels(self.name).inc(len(slots))

    def rest(self) -> None:
        """Between ticks: what the gauges say of gears that recover without work."""
        if not self._scheduler.jobs:
            self._tell_gears(self._clock() - self._ended)

    def _tell_gears(self, idle_s: float = 0.0) -> None:
        if len(self.gears.rungs) > 1:
            news = self.gears.news(idle_s)
            self._metrics.geared(
                self.name, self.gears.rungs, news.rung, vars(news.strain), news.shifts, news.floor_hits
            )

    def admission_rate(self) -> float:
        """Cost per second that deadlines are judged by; 0: whatever comes begins at once, or nothing is known."""
        return self.gears.admission_rate() or self.rate.pressed_per_second()

    def _let_go(self) -> list[Progress]:
        """Every job leaves with what its rows have so far."""
        suspended = self._reporter.everything()
        for progress in suspended:
            self._scheduler.drop(progress.delivery.attempt)
        self._publish()
        self._had_work_until = None
        return suspended

    def _receive(self) -> bool:
        """Take in what other threads left here; whether all of it is to be suspended."""
        with self._lock:
            inbox, self._inbox = self._inbox, []
            withdrawn, self._withdrawn = self._withdrawn, set()
            suspending, self._suspending = self._suspending, False
            for delivery, offered_ms in inbox:
                least = self.gears.received(delivery)
                self._scheduler.add(delivery, offered_ms, evaluations_of(delivery), least)
            for attempt in withdrawn:
                self._scheduler.drop(attempt)
            self._free = self._scheduler.free_rows()
        for delivery, _ in inbox:
            if delivery.deliveries > 1:
                self._metrics.redeliveries.labels(self.name).inc()
        return suspending

    def _publish(self) -> None:
        with self._lock:
            self._free = self._scheduler.free_rows()
            self._idle = not self._inbox and not self._scheduler.jobs
        busy = self._scheduler.busy_slots
        self._slots["busy"].set(busy)
        self._slots["free"].set(self.capacity - busy)

    def _admit(self, admission: Admission, now_ms: float) -> list[Finished]:
        job, work = admission.job, self.gears.work(admission.job)
        if job.admitted_ms is not None and 0 in admission.indices:
            self._queue_wait.observe(_queue_s(job, job.admitted_ms))
            slack_s = self._scheduler.slack_ms(job, now_ms, self.rate.pace()) / 1000
            self._slack.observe(max(0.0, slack_s))
        rows = self._restore(job, work, list(zip(admission.indices, admission.slots, strict=True)))
        failed: list[Finished] = []

        def admit(rows: Sequence[tuple[int, int]]) -> None:
            indices, slots = zip(*rows, strict=True)
            self._scheduler.admitted(job, slots, self.task.admit(work, indices, slots))

        def blame(row: tuple[int, int], error: Exception) -> None:
            failed.extend(self._fail([job], error, "admit"))

        self._splitter.run(rows, admit, blame, wanted=lambda row: not failed, reasons=("memory",))
        return failed

    def _restore(self, job: JobRun, work: Any, rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Go on with rows whose state an earlier attempt saved; returns (image, slot) of those that begin."""
        states = job.delivery.states
        saved = [row for row in rows if states.get(row[0])]
        if not saved:
            return rows
        indices, slots = zip(*saved, strict=True)
        try:
            left = self.task.restore(work, indices, slots, [states[index] for index in indices])
            self._scheduler.admitted(job, slots, left)
        except Exception:
            log.exception("rows begin again", extra={"model": self.name, "job": _id(job), "rows": len(saved)})
            return rows
        self._metrics.rows_restored.labels(self.name).inc(len(saved))
        return [row for row in rows if not states.get(row[0])]

    def _step(self, batch: Sequence[int]) -> tuple[StepStats | None, list[Finished]]:
        """One evaluation for every row; of a batch that fails, those jobs fail whose rows fail by themselves."""
        failed: list[Finished] = []

        def step(slots: Sequence[int]) -> StepStats:
            stats = self.task.step(slots)
            self._scheduler.stepped([slot for slot in slots if slot not in stats.waiting], stats.finished)
            return stats

        def blame(slot: int, error: Exception) -> None:
            failed.extend(self._fail(self._scheduler.owners([slot]), error, "step"))

        parts = self._splitter.run(batch, step, blame, wanted=self._scheduler.holds)
        return merged(parts), failed

    def _collect(self) -> list[Finished]:
        over: list[Finished] = []
        for slots in self._scheduler.finished().values():
            [job] = self._scheduler.owners(slots)
            try:
                outputs = self.task.collect(slots)
                complete = self._scheduler.collected(slots, outputs)
                over += [self._completed(job) for job in complete]
            except Exception as error:
                if is_lost(error):
                    raise
                over += self._fail([job], error, "collect")
        return over

    def _completed(self, job: JobRun) -> Finished:
        rows = tuple(job.rows())
        receipt = self.gears.receipt(job, self.task.receipt(self.gears.work(job), rows))
        now = self._clock()
        queue_s, run_s = self._times(job, now)
        if now * 1000 > job.deadline_ms:
            self._metrics.deadline_missed.labels(self.name, "running").inc()
        self._run.observe(run_s)
        return Finished(job.delivery, "ok", rows=rows, receipt=receipt, queue_s=queue_s, run_s=run_s)

    def _late(self, job: JobRun, now: float, why: str = "") -> Finished:
        queue_s, run_s = self._times(job, now)
        why = why or ("waiting" if job.admitted_ms is None else "running")
        self._metrics.deadline_missed.labels(self.name, why).inc()
        return Finished(job.delivery, "expired", failure=lateness(why), queue_s=queue_s, run_s=run_s)

    def _fail(self, jobs: Sequence[JobRun], error: Exception, verb: str) -> list[Finished]:
        where = {"model": self.name, "verb": verb, "jobs": [_id(job) for job in jobs]}
        if isinstance(error, UserError):
            log.info("job refused", extra=where | {"reason": str(error)})
        else:
            log.exception("task failed", extra=where)
        failure = failure_of(error, verb)
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


def _admission_stats(plan: Plan) -> StepStats:
    """A tick that only admitted worked on the rows it admitted."""
    return StepStats(rows=sum(len(admission.slots) for admission in plan.admissions))
