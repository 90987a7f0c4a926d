"""Plan a job's depths: pure Python over times, no torch."""

from __future__ import annotations

from collections.abc import Iterable

from models.api import ExitSchedule, Gear, UserError


class ScheduleMismatch(UserError):
    """An exit schedule tuned for other weights."""


def plan(schedule: ExitSchedule, times: Iterable[float]) -> list[int]:
    """Blocks to run at each evaluation time u."""
    return [schedule.depth(float(u)) for u in times]


def check(gear: Gear, weights: str, depth: int) -> None:
    """Refuse a gear whose schedule was tuned for other weights or asks for more blocks than there are."""
    schedule = gear.schedule
    if schedule.weights and schedule.weights != weights:
        raise ScheduleMismatch(
            f"gear {gear.name!r} was tuned for weights {schedule.weights[:12]}, the model has {weights[:12]}: "
            "re-run `offramp train exits`, or remove the gear from gears.json"
        )
    if max(schedule.depths) > depth:
        raise ScheduleMismatch(f"gear {gear.name!r} asks for {max(schedule.depths)} blocks of {depth}")
