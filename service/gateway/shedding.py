"""A gateway that falls behind refuses new work before it costs much: what it has taken can still be answered in time.

`Shed` knows no deadlines and refuses what it has not read; a `Flow` tells admission how long answers take now, so that
work with too little time is refused at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unavailable
from service.gateway.forecasts import Forecasts
from service.gateway.middleware import TASKS

LOOK_S = 0.05
LOOKS = 4  # in a row: one stall is no overload
BEHIND_S = 0.25
LEAST, SEVERAL = 16, 2  # answers
MEMORY_S, OLDEST_S, WARY_S = 0.25, 5.0, 1.0


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
    """Requests alike that this gateway has in flight, and how fast they are answered: by Little's law what comes now
    takes the one divided by the other, whatever holds it up.

    It says so only for WARY_S after several of the last answers were late: of a service that keeps up the rate is no
    capacity. Fewer than LEAST answers within OLDEST_S say nothing.

    Attributes:
        forecasts: what was foreseen when they were queued, against what came true.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.forecasts = Forecasts(clock)
        self._clock = clock
        self._in_flight = 0
        self._answered: deque[float] = deque()
        self._late: deque[bool] = deque(maxlen=LEAST)
        self._wary_until = -math.inf
        self._refused = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """One more is in flight."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def answered(self, late: bool) -> None:
        """One has its answer, or was too late for one."""
        now = self._clock()
        self._answered.append(now)
        while len(self._answered) > LEAST and self._answered[0] < now - MEMORY_S:
            self._answered.popleft()
        self._late.append(late)
        if sum(self._late) >= SEVERAL:
            self._wary_until = now + WARY_S

    def seconds(self) -> float:
        """What the next one should take; 0 while all is well."""
        now, answers = self._clock(), len(self._answered)
        if now > self._wary_until or answers < LEAST or self._answered[0] < now - OLDEST_S:
            return 0.0
        return self._in_flight * max(MEMORY_S, now - self._answered[0]) / answers

    def refuse(self, cost: int) -> None:
        """Work of this cost was refused for it."""
        self._refused += cost

    def refused(self) -> int:
        """Cost of what was refused since the last call."""
        cost, self._refused = self._refused, 0
        return cost


class Flows:
    """Flows by what makes requests alike: model, priority, and the budget's power of two."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._flows: defaultdict[tuple[str, str, int], Flow] = defaultdict(lambda: Flow(clock))

    def of(self, model: str, priority: str, budget_s: float) -> Flow:
        """The flow that such a request belongs to."""
        return self._flows[model, priority, math.frexp(budget_s)[1]]


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
