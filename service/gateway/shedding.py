"""A gateway that falls behind refuses new work before it costs much: what it has taken can still be answered in time.

`Shed` knows no deadlines and refuses what it has not read; a `Flow` tells admission how long answers take now, so that
work with too little time is refused at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unavailable
from service.gateway.middleware import TASKS

LOOK_S = 0.05
LOOKS = 4  # in a row: one stall is no overload
BEHIND_S = 0.25
LEAST = 16  # answers
MEMORY_S = 0.25
WARY_S = 1.0


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


class Flow:
    """What this gateway has in flight of one model, and how fast it is answered: by Little's law what comes now waits
    for the one divided by the other, whatever holds it up.

    It says so only while answers came late a moment ago: of a service that keeps up the rate is no capacity.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight = 0.0
        self._answered: deque[tuple[float, float]] = deque()
        self._late_at = -math.inf

    @contextmanager
    def entered(self, cost: float) -> Iterator[None]:
        """Work of this cost is in flight."""
        self._in_flight += cost
        try:
            yield
        finally:
            self._in_flight -= cost

    def answered(self, cost: float, late: bool) -> None:
        """Some of it has its answer, or was too late for one."""
        now = self._clock()
        if late:
            self._late_at = now
        self._answered.append((now, cost))
        while len(self._answered) > LEAST and self._answered[0][0] < now - MEMORY_S:
            self._answered.popleft()

    def seconds(self) -> float:
        """Until what is in flight is answered; 0 while all is well."""
        now = self._clock()
        if now - self._late_at > WARY_S or len(self._answered) < LEAST:
            return 0.0
        return self._in_flight * (now - self._answered[0][0]) / sum(cost for _, cost in self._answered)


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
