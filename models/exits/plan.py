"""Plan a job's depths: pure Python over times, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from models.api import ExitSchedule, Gear, UserError
from models.registry import EXITS, resolve


class ScheduleMismatch(UserError):
    """An exit schedule tuned for other weights."""


def make(spec: Mapping[str, Any], depth: int | None) -> ExitSchedule:
    """A schedule from its description in gears.json or a recipe.

    Args:
        spec: {"exit": name in EXITS, its parameters, "weights": digest}; without `exit` it is a `table`.
        depth: blocks of the full network; None when only tables are expected.
    """
    parameters = {"exit": "table", **spec}
    name, weights = parameters.pop("exit"), parameters.pop("weights", "")
    if depth is None and name != "table":
        raise UserError(f"exit {name!r} needs the depth of the network that it is for")
    try:
        made = resolve(EXITS, name)(depth or max(parameters["depths"]), **parameters)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"exit schedule {dict(spec)}: {error}") from None
    return dataclasses.replace(made, weights=weights)


def plan(schedule: ExitSchedule, times: Iterable[float]) -> list[int]:
    """Blocks to run at each evaluation time u."""
    return [schedule.depth(float(u)) for u in times]


def check(gear: Gear, weights: str, depth: int, force: bool = False, shallowest: int = 1) -> None:
    """Refuse a gear whose schedule was tuned for other weights, or asks for more or fewer blocks than can be run.

    `force` accepts other weights, never other depths. `shallowest` is the least that the backbone runs.
    """
    schedule = gear.schedule
    if schedule.weights and schedule.weights != weights and not force:
        raise ScheduleMismatch(
            f"gear {gear.name!r} was tuned for weights {schedule.weights[:12]}, the model has {weights[:12]}: "
            "re-run `offramp train exits`, or remove the gear from gears.json"
        )
    if max(schedule.depths) > depth:
        raise ScheduleMismatch(f"gear {gear.name!r} asks for {max(schedule.depths)} blocks of {depth}")
    if min(schedule.depths) < shallowest:
        raise ScheduleMismatch(
            f"gear {gear.name!r} asks for {min(schedule.depths)} blocks, but this backbone always runs {shallowest}"
        )
