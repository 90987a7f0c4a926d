"""How a job ends, as data: what it made, or why it did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.api import UserError
from service.errors import BadRequest, DeadlineExceeded, JobFailed
from service.protocol import Delivery, Failure, Outcome
from service.worker.splitting import is_memory

MESSAGE_LIMIT = 300
LATE = {
    "waiting": "the deadline passed while it waited",
    "running": "the deadline passed while it ran",
    "hopeless": "the deadline cannot be met, at what the work takes here",
}


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


def lateness(why: str) -> Failure:
    """A deadline passed or cannot be met; `why` is a key of LATE."""
    return Failure(DeadlineExceeded.code, LATE[why], DeadlineExceeded.retryable)


def failure_of(error: Exception, verb: str) -> Failure:
    """What a verb of the Task raised: the user's mistake by its field, or the job's failure."""
    if isinstance(error, UserError):
        return Failure(BadRequest.code, str(error), BadRequest.retryable, error.field)
    what = "out of memory with one row: " if is_memory(error) and verb != "collect" else ""
    message = f"{verb}: {what}{type(error).__name__}: {error}"[:MESSAGE_LIMIT]
    return Failure(JobFailed.code, message, JobFailed.retryable)
