"""What a run of the client says, as numbers. An answer is (due, latency, status), seconds from the start."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Seen = Sequence[float]
OK, LOST, UNREACHED, TOO_MANY, UNAVAILABLE = 200, 0, -1, 429, 503
NEVER = float("inf")


def quantile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile, one of the values; None of none."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


def goodput(seen: Iterable[Seen], deadline_s: float, seconds: float) -> float:
    """Right answers per second that came no later than `deadline_s` after they were due."""
    return sum(status == OK and took <= deadline_s for _, took, status in seen) / seconds


def window(seen: Iterable[Seen], start: float, end: float, by: str) -> list[Seen]:
    """What was due (`by` "due") or ended (`by` "end") in [start, end)."""
    ended = by == "end"
    return [answer for answer in seen if start <= answer[0] + ended * answer[1] < end]


def load_figures(inside: Sequence[Seen], seconds: float, deadline_s: float) -> dict[str, Any]:
    """Rates per second, latency of right answers in ms, and what else came."""
    latency = [1000 * took for _, took, status in inside if status == OK]
    return {
        "offered_per_s": len(inside) / seconds,
        "answered_per_s": len(latency) / seconds,
        "goodput_per_s": goodput(inside, deadline_s, seconds),
        "p50_ms": quantile(latency, 0.5),
        "p95_ms": quantile(latency, 0.95),
        "p99_ms": quantile(latency, 0.99),
        "failed": sum(status != OK for *_, status in inside),
        "statuses": dict(Counter(str(int(status)) for *_, status in inside)),
    }


def kill_figures(seen: Sequence[Seen], killed_s: float) -> dict[str, Any]:
    """What became of accepted requests when the worker was killed at `killed_s`.

    Not accepted: no connection, 429, and 503 to what was answered before the kill or sent after it. Everything else was
    taken on.
    `held`: sent before the kill and not answered by then, `saved` of them were answered after all.
    `back_s`: from the kill to the first answer of a request that was sent after it; None when there was none.
    """

    def during(a: Seen) -> bool:
        return a[0] < killed_s < a[0] + a[1]

    refused = [a for a in seen if a[2] in (UNREACHED, TOO_MANY) or (a[2] == UNAVAILABLE and not during(a))]
    answered = sum(status == OK for *_, status in seen)
    accepted = len(seen) - len(refused)
    back = min((due + took - killed_s for due, took, status in seen if status == OK and due >= killed_s), default=NEVER)
    held = [a[2] for a in seen if during(a) and a[2] != TOO_MANY]
    return {
        "sent": len(seen),
        "held": len(held),
        "saved": held.count(OK),
        "refused": len(refused),
        "accepted": accepted,
        "answered": answered,
        "share": answered / accepted if accepted else None,
        "back_s": None if back == NEVER else back,
        "statuses": dict(Counter(str(int(status)) for *_, status in seen)),
    }


def spread(values: Iterable[float | None]) -> list[float] | None:
    """Median, least and greatest of what is there; None of nothing."""
    there = [value for value in values if value is not None]
    return [statistics.median(there), min(there), max(there)] if there else None
