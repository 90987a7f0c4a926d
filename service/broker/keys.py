"""Every Redis key. A model's keys share one hash tag, so its scripts touch one slot; they build them from `prefix`."""

from __future__ import annotations

from typing import get_args

from models.api import Priority

GROUP = "workers"
CATALOGUE = "offramp:catalogue"
RANKS: tuple[Priority, ...] = get_args(Priority)


def prefix(model: str) -> str:
    """What all keys of a model begin with."""
    return f"offramp:{{m:{model}}}:"


def queue(model: str, rank: Priority = "normal") -> str:
    """Stream of waiting and running jobs of a rank, one entry a job; never trimmed."""
    return f"{prefix(model)}q:{rank}"


def job(model: str, job_id: str) -> str:
    """Hash of a job: state, payload, entry, deadline, attempt, progress."""
    return f"{prefix(model)}job:{job_id}"


def result(model: str, job_id: str) -> str:
    """Encoded result, with a time to live."""
    return f"{prefix(model)}res:{job_id}"


def events(model: str, job_id: str) -> str:
    """Stream of what happened to a job that somebody may follow."""
    return f"{prefix(model)}ev:{job_id}"


def checkpoint(model: str, job_id: str) -> str:
    """Hash of image index to the saved state of its row."""
    return f"{prefix(model)}ck:{job_id}"


def preview(model: str, job_id: str) -> str:
    """What a running job's images looked like last, encoded."""
    return f"{prefix(model)}pv:{job_id}"


def backlog(model: str) -> str:
    """Hash of rank to queued and running cost."""
    return f"{prefix(model)}backlog"


def turns(model: str) -> str:
    """Hash of the fair queue's clock and each rank's tag."""
    return f"{prefix(model)}turns"


def owed(model: str) -> str:
    """Hash of API key to its queued and running cost."""
    return f"{prefix(model)}owed"


def ledger(model: str) -> str:
    """Hash of counts: accepted and every outcome; accepted = outcomes + queued + in flight."""
    return f"{prefix(model)}ledger"


def due(model: str) -> str:
    """Sorted set of entries that wait or run, by deadline: when to look whether one is overdue."""
    return f"{prefix(model)}due"


def letters(model: str) -> str:
    """Stream of dead letters."""
    return f"{prefix(model)}dlq"


def hooks(model: str) -> str:
    """Sorted set of ended jobs whose webhook is to be told, by when the next try is due."""
    return f"{prefix(model)}hooks"


def hook(model: str, job_id: str) -> str:
    """Hash of a webhook: url, outcome, tries."""
    return f"{prefix(model)}hook:{job_id}"


def workers(model: str) -> str:
    """Sorted set of worker ids by last sign of life (Redis TIME, milliseconds)."""
    return f"{prefix(model)}workers"


def rates(model: str) -> str:
    """Hash of worker id to measured drain rate, cost per second."""
    return f"{prefix(model)}rates"


def pressed(model: str) -> str:
    """Hash of worker id to the drain rate that deadlines are judged by; 0: work begins at once, or nobody knows."""
    return f"{prefix(model)}pressed"


def reply(gateway: str) -> str:
    """A gateway's stream of (id, status) wake-ups; bounded and expiring."""
    return f"offramp:reply:{gateway}"


def control(worker: str) -> str:
    """A worker's stream of cancelled entries; bounded and expiring."""
    return f"offramp:ctl:{worker}"


def bucket(owner: str) -> str:
    """An API key's token bucket."""
    return f"offramp:bucket:{owner}"


def idempotency(digest: str) -> str:
    """Fingerprint of the request that an Idempotency-Key stands for."""
    return f"offramp:idem:{digest}"
