"""Every error a user can meet.

    OfframpError                 500 internal          something broke; the log says what
    |- BadRequest                422 bad_request       the request cannot be understood; names the field
    |   |- UnknownName           422 unknown_name      no such model, label, gear, method
    |   `- NotAnImage            422 not_an_image      bytes that are no picture we read
    |- Unauthorized              401 unauthorized      no API key, or none that is known
    |- Forbidden                 403 forbidden         the API key does not allow it
    |- NotFound                  404 not_found         no such page, model or job
    |- NotAllowed                405 not_allowed       no such method on this path
    |- NotAcceptable             406 not_acceptable    no representation the client accepts
    |- IdempotencyConflict       409 key_reused        the Idempotency-Key stands for another request
    |- Cancelled                 409 cancelled         the job was cancelled
    |- JobOver                   409 job_over          the job has ended and cannot be cancelled
    |- TooLarge                  413 too_large         body or picture above the limit
    |- QueueFull                 429 queue_full        backlog at its budget; Retry-After says when
    |   |- RateLimited           429 rate_limited      the API key asks too often
    |   `- QuotaExceeded         429 quota_exceeded    the API key has too much queued and running
    |- JobFailed                 500 job_failed        the worker could not run it
    |- Unavailable               503 unavailable       Redis away, or no worker
    |   |- NoWorker              503 no_worker         nobody serves the model now
    |   `- UnfitStore            503 unfit_store       the store would lose work
    `- DeadlineExceeded          504 deadline_exceeded the budget ran out before the answer

Only gateway/app.py turns these into HTTP. Across the wire an error is `protocol.Failure`: data.
"""

from __future__ import annotations

from typing import ClassVar


class OfframpError(Exception):
    """Base: `code` is the stable name, `status` the HTTP status, `retryable` whether to try again."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, field: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail, self.field, self.retry_after_s = detail, field, retry_after_s


class BadRequest(OfframpError):
    """The request cannot be understood; `field` names the part at fault."""

    code, status, title = "bad_request", 422, "Bad request"


class UnknownName(BadRequest):
    """No such model, label, gear or method."""

    code, title = "unknown_name", "Unknown name"


class NotAnImage(BadRequest):
    """Bytes that are no picture we read."""

    code, title = "not_an_image", "Not an image"


class Unauthorized(OfframpError):
    """No API key, or none that is known."""

    code, status, title = "unauthorized", 401, "Unauthorized"


class Forbidden(OfframpError):
    """The API key does not allow it."""

    code, status, title = "forbidden", 403, "Forbidden"


class NotFound(OfframpError):
    """No such page, model or job."""

    code, status, title = "not_found", 404, "Not found"


class NotAllowed(OfframpError):
    """The page does not know this method."""

    code, status, title = "not_allowed", 405, "Method not allowed"


class NotAcceptable(OfframpError):
    """No representation that the client accepts."""

    code, status, title = "not_acceptable", 406, "Not acceptable"


class IdempotencyConflict(OfframpError):
    """The Idempotency-Key stands for another request."""

    code, status, title = "key_reused", 409, "Idempotency key reused"


class Cancelled(OfframpError):
    """The job was cancelled."""

    code, status, title = "cancelled", 409, "Cancelled"


class JobOver(OfframpError):
    """The job has ended and cannot be cancelled."""

    code, status, title = "job_over", 409, "Job is over"


class TooLarge(OfframpError):
    """Body or picture above the limit."""

    code, status, title = "too_large", 413, "Too large"


class QueueFull(OfframpError):
    """The backlog is at its budget."""

    code, status, title, retryable = "queue_full", 429, "Queue full", True


class RateLimited(QueueFull):
    """The API key asks too often."""

    code, title = "rate_limited", "Too many requests"


class QuotaExceeded(QueueFull):
    """The API key has too much queued and running."""

    code, title = "quota_exceeded", "Quota exceeded"


class JobFailed(OfframpError):
    """The worker could not run the job."""

    code, status, title = "job_failed", 500, "Job failed"


class Unavailable(OfframpError):
    """The service cannot take work now."""

    code, status, title, retryable = "unavailable", 503, "Service unavailable", True


class NoWorker(Unavailable):
    """Nobody serves the model now."""

    code, title = "no_worker", "No worker"


class UnfitStore(Unavailable):
    """The store would lose work: an eviction policy, its age, a command it lacks."""

    code, title = "unfit_store", "Unfit store"


class DeadlineExceeded(OfframpError):
    """The budget ran out before the answer, or would; `foreseen_ms`: how long it was foreseen to take, then."""

    code, status, title, retryable = "deadline_exceeded", 504, "Deadline exceeded", True
    foreseen_ms = 0


def by_code() -> dict[str, type[OfframpError]]:
    """Every error class by its code."""
    found: dict[str, type[OfframpError]] = {}
    stack: list[type[OfframpError]] = [OfframpError]
    while stack:
        kind = stack.pop()
        found[kind.code] = kind
        stack.extend(kind.__subclasses__())
    return found
