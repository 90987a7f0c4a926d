"""A job on its way to the queue: what submit.lua gets of it."""

from __future__ import annotations

from dataclasses import dataclass

from service.broker.store import ALIVE_MS, Call
from service.protocol import Job, Terms


@dataclass(frozen=True)
class Submission:
    """A job on its way to the queue: its terms as of `since` (time.monotonic()), its wire form."""

    job: Job
    payload: bytes
    terms: Terms
    since: float

    def call(self, now: float) -> Call:
        """What submit.lua gets; the time since then is off the budget."""
        job, t = self.job, self.terms
        left_ms = max(1, t.deadline_ms - round((now - self.since) * 1000))
        return job.work.model, (
            *(job.id, self.payload, t.rows, job.cost, left_ms, t.max_backlog, t.priority, t.owner, t.max_owed),
            *(t.reply_to, "1" if t.events else "", t.webhook, ALIVE_MS if t.need_worker else 0, t.refused, t.limit),
        )
