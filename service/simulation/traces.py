"""Arrivals: read from a file, or drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from models.api import MAX_ROWS, Priority, UserError
from service.broker.keys import RANKS

BURST_S, BURST, LULL = 5.0, 1.75, 0.25


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, seconds from the start, and what it asks for (docs/api.md); None: the default.

    The model's own labels and seeds take no part.
    """

    at: float
    n: int = 1
    gear: str = "auto"
    floor: str | float | None = None
    max_compute: float | None = None
    deadline_ms: int | None = None
    steps: int | None = None
    priority: Priority = "normal"

    def __post_init__(self) -> None:
        if self.at < 0:
            raise ValueError("at: seconds from the start, not below 0")
        if not 1 <= self.n <= MAX_ROWS:
            raise ValueError(f"n: from 1 to {MAX_ROWS} images")
        if self.deadline_ms is not None and self.deadline_ms < 1:
            raise ValueError("deadline_ms: at least 1")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise ValueError("steps: from 1 to 1000")
        if self.priority not in RANKS:
            raise ValueError(f"priority: one of {', '.join(RANKS)}")


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals of a file of JSON lines, in order of time.

    Raises:
        UserError: the file, or a line of it by number.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a trace: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(Arrival(**json.loads(line)))
            except (TypeError, ValueError) as error:
                known = ", ".join(field.name for field in fields(Arrival))
                raise UserError(
                    f"{path}, line {number}: {error}; a line is a JSON object with `at` and any of {known}"
                ) from None
    if not found:
        raise UserError(f"{path}: no arrivals")
    return sorted(found, key=lambda arrival: arrival.at)


def write_trace(path: Path, arrivals: list[Arrival]) -> None:
    """Arrivals as `read_trace` reads them."""
    usual = asdict(Arrival(0.0))
    lines = [{k: v for k, v in asdict(one).items() if k == "at" or v != usual[k]} for one in arrivals]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process."""
    return list(_arrivals(lambda now: rate, rate, seconds, seed))


def bursts(rate: float, seconds: float, seed: int) -> list[float]:
    """`BURST` times the rate for `BURST_S`, `LULL` times for as long, and so on: its mean is `rate`."""
    return list(_arrivals(lambda t: rate * (LULL if int(t / BURST_S) % 2 else BURST), BURST * rate, seconds, seed))


def _arrivals(rate: Callable[[float], float], most: float, seconds: float, seed: int) -> Iterator[float]:
    """An inhomogeneous Poisson process, by thinning (Lewis and Shedler 1979)."""
    draw, now = random.Random(seed), 0.0
    while (now := now + draw.expovariate(most)) < seconds:
        if draw.random() * most < rate(now):
            yield now


def asking(times: list[float], like: Arrival) -> list[Arrival]:
    """A request such as `like` at each time."""
    return [replace(like, at=at) for at in times]
