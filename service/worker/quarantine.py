"""Jobs that may kill their worker run alone in it, so that they cannot take others along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.worker.lane import Lane

REST_S = 0.02


class Quarantine:
    """Held by the lane that runs a job which may kill the process: then no other lane takes or runs any."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder: Lane | None = None
        self.lanes: list[Lane] = []

    def forbids(self, lane: Lane) -> bool:
        """Whether another lane holds it."""
        return self.holder is not None and self.holder is not lane

    @asynccontextmanager
    async def held(self, lane: Lane) -> AsyncIterator[None]:
        """From when all other engines have come to rest."""
        async with self.lock:
            self.holder = lane
            try:
                while not all(other.engine.idle() for other in self.lanes if other is not lane):  # noqa: ASYNC110
                    await asyncio.sleep(REST_S)
                yield
            finally:
                self.holder = None
                for other in self.lanes:
                    other.room.set()
