"""Who asks. (A stand-in until the branch with API keys is merged.)"""

from __future__ import annotations

from dataclasses import dataclass

from models.api import Priority


@dataclass(frozen=True)
class Caller:
    """Whoever asks, and what they may."""

    id: str = ""
    max_owed: int = 0

    def allowed(self, priority: Priority | None) -> Priority:
        """The priority to use."""
        return priority or "normal"


async def caller() -> Caller:
    """Anybody."""
    return Caller()
