"""A table that a user writes, or that `models.exits.optimise` found."""

from __future__ import annotations

from collections.abc import Sequence

from models.api import ExitSchedule, UserError


def schedule(depth: int, *, edges: Sequence[float], depths: Sequence[int]) -> ExitSchedule:
    """`depths[i]` blocks below `edges[i]`; the last edge is 1.0."""
    made = ExitSchedule(tuple(edges), tuple(depths))
    if max(made.depths) > depth:
        raise UserError(f"exit `table` asks for {max(made.depths)} blocks of {depth}")
    return made
