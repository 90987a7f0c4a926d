"""A gateway that falls behind refuses new work before it reads it: what it has taken can still be answered in time."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unavailable
from service.gateway.middleware import TASKS

LOOK_S = 0.05
LOOKS = 4  # in a row: one stall is no overload
BEHIND_S = 0.25


class Lag:
    """How far the event loop is behind; `async with` watches it."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=LOOKS)
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Lag:
        self._watch = asyncio.create_task(self._run(), name="lag")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watch:
            self._watch.cancel()
        self._seen.clear()

    def seconds(self) -> float:
        """The least of the last looks; 0 before there were enough."""
        return min(self._seen) if len(self._seen) == LOOKS else 0.0

    async def _run(self) -> None:
        while True:
            due = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self._seen.append(time.monotonic() - due)


class Shed:
    """ASGI middleware: Unavailable for new work while the loop is `BEHIND_S` behind; all else passes."""

    def __init__(self, app: ASGIApp, lag: Lag) -> None:
        self._app, self._lag = app, lag

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in TASKS:
            behind_s = self._lag.seconds()
            if behind_s > BEHIND_S:
                raise Unavailable(f"this gateway is {behind_s:.1f} s behind: it has too much to do", retry_after_s=1)
        await self._app(scope, receive, send)
