"""What a job has to tell before it is over: saved rows to go on from, how far it is, what its images look like."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.api import Task
from service.protocol import Delivery
from service.worker.scheduler import JobRun, Scheduler

PREVIEWS = 4
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        done, of: evaluations of all its rows so far, earlier attempts' included, and at most.
        states: saved rows by image; empty when none are due.
        previews: uint8 pixels (H, W, C) by image, for jobs with `events`; empty when not due.
    """

    delivery: Delivery
    done: int
    of: int
    states: Mapping[int, bytes] = field(default_factory=dict)
    previews: Mapping[int, Any] = field(default_factory=dict)


class Reporter:
    """Saves the rows of every job each `checkpoint_ticks` ticks (0: never); tells those that may be followed more."""

    def __init__(self, task: Task[Any, Any], scheduler: Scheduler, checkpoint_ticks: int, progress_s: float) -> None:
        self._task, self._scheduler = task, scheduler
        self._checkpoint_ticks, self._progress_ms = checkpoint_ticks, progress_s * 1000

    def due(self, tick: int, now_ms: float) -> list[Progress]:
        """What the jobs that run have to tell after `tick`."""
        saving: list[JobRun] = []
        telling: list[JobRun] = []
        for job in self._scheduler.jobs:
            if not job.running:
                continue
            if job.saved_tick is None:
                job.saved_tick = tick - 1
            if self._checkpoint_ticks and tick - job.saved_tick >= self._checkpoint_ticks:
                job.saved_tick = tick
                saving.append(job)
            if job.delivery.events and now_ms - job.told_ms >= self._progress_ms:
                job.told_ms = now_ms
                telling.append(job)
        if not saving and not telling:
            return []
        states = self._save(saving)
        told = {job.attempt: self._progress(job, states.get(job.attempt, {}), self._preview(job)) for job in telling}
        for job in saving:
            if job.attempt not in told and states[job.attempt]:
                told[job.attempt] = self._progress(job, states[job.attempt], {})
        return list(told.values())

    def everything(self) -> list[Progress]:
        """Every job with the states of its running rows."""
        states = self._save([job for job in self._scheduler.jobs if job.running])
        return [self._progress(job, states.get(job.attempt, {}), {}) for job in self._scheduler.jobs]

    def _progress(self, job: JobRun, states: Mapping[int, bytes], previews: Mapping[int, Any]) -> Progress:
        done, of = self._scheduler.progress(job)
        return Progress(job.delivery, done, of, states, previews)

    def _save(self, jobs: Sequence[JobRun]) -> dict[str, dict[int, bytes]]:
        """States of these jobs' running rows, by attempt and image: one call for all of them."""
        states: dict[str, dict[int, bytes]] = {job.attempt: {} for job in jobs}
        rows = [(job, index, slot) for job in jobs for slot, index in job.running.items()]
        try:
            blobs = self._task.save([slot for _, _, slot in rows]) if rows else []
        except Exception:
            log.exception("rows not saved", extra={"model": self._task.info.name, "rows": len(rows)})
            return states
        for (job, index, _), blob in zip(rows, blobs, strict=True):
            if blob:
                states[job.attempt][index] = blob
        return states

    def _preview(self, job: JobRun) -> dict[int, Any]:
        """The first images that run, as they look now."""
        shown = sorted((index, slot) for slot, index in job.running.items())[:PREVIEWS]
        try:
            pixels = self._task.preview([slot for _, slot in shown])
        except Exception:
            log.exception("no preview", extra={"model": self._task.info.name, "job": job.delivery.job.id})
            return {}
        return {index: seen for (index, _), seen in zip(shown, pixels, strict=True) if seen is not None}
