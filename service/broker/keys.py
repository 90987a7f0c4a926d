"""Every Redis key. A model's keys share one hash tag, so its scripts touch one slot."""

from __future__ import annotations

GROUP = "workers"
CATALOGUE = "offramp:catalogue"


def queue(model: str) -> str:
    """Stream of waiting jobs, one entry a job; never trimmed."""
    return f"offramp:{{m:{model}}}:q"


def job(model: str, job_id: str) -> str:
    """Hash of a job: state, payload, cost, deadline."""
    return f"offramp:{{m:{model}}}:job:{job_id}"


def result(model: str, job_id: str) -> str:
    """Encoded result, with a time to live."""
    return f"offramp:{{m:{model}}}:res:{job_id}"


def backlog(model: str) -> str:
    """Queued and running cost."""
    return f"offramp:{{m:{model}}}:backlog"


def ledger(model: str) -> str:
    """Hash of counts: accepted and every outcome; accepted = outcomes + queued + in flight."""
    return f"offramp:{{m:{model}}}:ledger"


def workers(model: str) -> str:
    """Sorted set of worker ids by last sign of life (Redis TIME, milliseconds)."""
    return f"offramp:{{m:{model}}}:workers"


def rates(model: str) -> str:
    """Hash of worker id to measured drain rate, cost per second."""
    return f"offramp:{{m:{model}}}:rates"


def reply(gateway: str) -> str:
    """A gateway's stream of (id, status) wake-ups; bounded and expiring."""
    return f"offramp:reply:{gateway}"
