"""What crosses Redis: typed msgpack, never pickle. One dataclass per message and receiver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from models.api import ClassifyWork, DecisionName, GenerateWork, ModelInfo, Priority

Outcome = Literal["ok", "failed", "expired", "cancelled", "dead"]
T = TypeVar("T")


class GenerateJob(msgspec.Struct, frozen=True, tag="generate", kw_only=True):
    """Gateway to worker: draw these images. `cost` is the planned layer evaluations."""

    id: str
    cost: int
    work: GenerateWork
    traceparent: str = ""


class ClassifyJob(msgspec.Struct, frozen=True, tag="classify", kw_only=True):
    """Gateway to worker: classify these images. `cost` is the planned network calls."""

    id: str
    cost: int
    work: ClassifyWork
    traceparent: str = ""


Job = GenerateJob | ClassifyJob


LIMIT = 0.85  # of a budget; the rest is for what nobody foresees


@dataclass(frozen=True)
class Terms:
    """What a job is queued under.

    Attributes:
        deadline_ms: budget from now; Redis TIME says when that is over.
        max_backlog: cost of the model's queue above which the job is refused.
        reply_to: gateway to wake at the end; empty for none.
        owner: API key that asked; empty for none.
        max_owed: cost that the owner may have queued and running on this model; 0: no limit.
        events: keep a stream of what happens to it.
        webhook: URL to tell at the end; empty for none.
        need_worker: refuse when no live worker serves the model.
        refused: cost of work that the gateway refused since its last job: it was asked for too.
        limit: share of the budget that may be foreseen for what is ahead and the job itself.
    """

    rows: int
    deadline_ms: int
    max_backlog: int
    reply_to: str = ""
    priority: Priority = "normal"
    owner: str = ""
    max_owed: int = 0
    events: bool = False
    webhook: str = ""
    need_worker: bool = False
    refused: int = 0
    limit: float = LIMIT


@dataclass(frozen=True)
class Delivery:
    """One job as a worker received it. Times are milliseconds of Redis TIME.

    Attributes:
        entry: handle of the lease: rank and stream id.
        attempt: fencing token, unique per delivery.
        deliveries: how often the entry was delivered, this time included.
        solo: redelivered so often that it runs alone: whatever kills its worker must not take others along.
        events: somebody may follow it (progress, previews).
        states: what earlier attempts saved of its rows (`Task.save`), by image.
    """

    job: Job
    entry: str
    attempt: str
    deliveries: int
    submitted_ms: int
    deadline_ms: int
    taken_ms: int
    solo: bool = False
    events: bool = False
    states: Mapping[int, bytes] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Failure:
    """An error as data: `code` is one of errors.by_code(); `field` the request's field at fault."""

    code: str
    message: str
    retryable: bool = False
    field: str | None = None


@dataclass(frozen=True)
class EncodedImage:
    """One generated image, already encoded."""

    data: bytes
    label: int
    seed: int


@dataclass(frozen=True)
class Prediction:
    """One classified image: probabilities in label order, uncertainty in nats; the rest as in ClassifiedRow."""

    probabilities: tuple[float, ...]
    uncertainty: dict[str, float]
    decision: DecisionName | None = None
    prediction_set: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Result:
    """Worker to gateway, kept under the result key. Exactly one of images/predictions/failure is set.

    `top_k`: classes that the answer lists for each prediction; 0 for all.
    """

    id: str
    outcome: Outcome
    queue_s: float = 0.0
    run_s: float = 0.0
    receipt: dict[str, Any] = field(default_factory=dict)
    images: tuple[EncodedImage, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    top_k: int = 0
    failure: Failure | None = None
    worker: str = ""


def encode(message: Any) -> bytes:
    """Msgpack bytes of any message above."""
    return msgspec.msgpack.encode(message)


def decode(kind: type[T], data: bytes) -> T:
    """Typed decoding; raises msgspec.ValidationError on anything that is not a `kind`."""
    return msgspec.msgpack.decode(data, type=kind)


def decode_job(data: bytes) -> Job:
    """A job of either kind."""
    job: Job = msgspec.msgpack.decode(data, type=Job)
    return job


def decode_info(data: bytes) -> ModelInfo:
    """A catalogue entry."""
    return msgspec.msgpack.decode(data, type=ModelInfo)
