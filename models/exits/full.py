"""Every block at every time."""

from __future__ import annotations

from models.api import ExitSchedule


def schedule(depth: int) -> ExitSchedule:
    """All `depth` blocks for u in [0, 1]."""
    return ExitSchedule((1.0,), (depth,))
