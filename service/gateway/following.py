"""A job's story as server-sent events (text/event-stream of the HTML standard)."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from service.broker.jobs import Event, JobStatus
from service.broker.letters import model_of
from service.errors import RateLimited, Unavailable
from service.gateway.schemas import job_state
from service.gateway.state import Gateway
from service.keys import Caller

PING_S = 15.0
LOOK_S = 2.0
PAUSE_S = (0.1, 1.0)
START = "0"
MOST = 64
RETRY_AFTER_S = 5


class Crowd:
    """Requests of each API key that last: followers and long polls. Where nobody needs a key nobody is counted."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def admit(self, who: Caller) -> None:
        """RateLimited when `who` has `MOST` of them open here."""
        if who.id and self._counts[who.id] >= MOST:
            said = f"this API key has {MOST} event streams and waiting requests open at this gateway"
            raise RateLimited(said, retry_after_s=RETRY_AFTER_S)

    @contextmanager
    def joined(self, who: Caller) -> Iterator[None]:
        """Count one while it lasts."""
        self._counts[who.id] += 1
        try:
            yield
        finally:
            self._counts[who.id] -= 1
            self._counts += Counter()  # forget who has none


async def follow(
    gateway: Gateway, crowd: Crowd, who: Caller, job_id: str, after: str, leaving: Callable[[], bool]
) -> AsyncIterator[str]:
    """Events past `after` until the job is over or the process is `leaving`.

    A follower holds no connection to Redis while it waits: it asks again after a pause that grows from `PAUSE_S[0]` to
    `PAUSE_S[1]` seconds while nothing happens.
    """
    story, pause, spoke = Story(gateway, job_id, after), PAUSE_S[0], time.monotonic()
    with crowd.joined(who), gateway.replies.expect(job_id) as waiter:
        while not leaving():
            with suppress(Unavailable):
                for line in await story.news():
                    yield line
                    pause, spoke = PAUSE_S[0], time.monotonic()
            if story.told:
                return
            if time.monotonic() - spoke >= PING_S:
                yield ": ping\n\n"
                spoke = time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await waiter.look.wait()
            waiter.look.clear()
            pause = min(2 * pause, PAUSE_S[1])


class Story:
    """What one follower has heard of a job; `told` once it knows the end, or that nobody knows the job any more.

    A job without a stream (it was not asked for as an async job) is told of as its status changes, without ids.
    """

    def __init__(self, gateway: Gateway, job_id: str, after: str) -> None:
        self.told = False
        self._broker, self._model, self._id, self._after = gateway.broker, model_of(job_id), job_id, after
        self._kept: bool | None = None
        self._known: JobStatus | None = None
        self._looked = float("-inf")

    async def news(self) -> list[str]:
        """What happened since the last call, as lines to send."""
        if self._kept is None:
            self._kept = self._after != START and bool(await self._read(START))
        if events := await self._read(self._after):
            self._after, self._kept = events[-1].id, True
            self.told = events[-1].name == "completed"
            return await self._lines(events)
        if self._known and self._known.over:
            self.told = True
            return [_line("completed", {"status": job_state(self._known.state)})]
        if self._kept and time.monotonic() - self._looked < LOOK_S:
            return []
        return await self._look()

    async def _lines(self, events: Sequence[Event]) -> list[str]:
        """Events as lines; of previews only the newest, and only while it is kept: that is until the end."""
        shown = [event for event in events if event.name == "preview"][-1:]
        pictures = await self._broker.preview(self._model, self._id) if shown else b""
        lines = []
        for event in events:
            if event.name != "preview":
                lines.append(_line(event.name, _data(event), event.id))
            elif pictures and event in shown:
                lines.append(_line("preview", _pictures(pictures), event.id))
        return lines

    async def _look(self) -> list[str]:
        """What the status says, where the stream is silent; an end may just have been written to the stream."""
        before, self._known = self._known, await self._broker.status(self._model, self._id)
        self._looked = time.monotonic()
        if self._known is None:
            self.told = True
            return []
        said = [] if self._kept else [_line(name, data) for name, data in _changes(before, self._known)]
        return said + await self.news() if self._known.over else said

    async def _read(self, after: str) -> list[Event]:
        return await self._broker.events(self._model, self._id, after, block_ms=1)


def _changes(before: JobStatus | None, now: JobStatus) -> list[tuple[str, dict[str, Any]]]:
    """The events that lie between two looks at a job."""
    said: list[tuple[str, dict[str, Any]]] = []
    if before is None:
        said.append(("queued", {}))
    if now.state == "running" and (before is None or before.state != "running"):
        said.append(("started", {}))
    if now.state == "running" and now.of and (before is None or before.done != now.done):
        said.append(("progress", {"done": now.done, "of": now.of}))
    return said


def _data(event: Event) -> dict[str, Any]:
    if event.name == "completed":
        return {"status": job_state(event.data.decode())}
    if event.name == "progress":
        return msgspec.msgpack.decode(event.data, type=dict[str, int])
    return {}


def _pictures(encoded: bytes) -> dict[str, str]:
    pictures = msgspec.msgpack.decode(encoded, type=dict[int, bytes])
    return {str(index): b64encode(picture).decode() for index, picture in pictures.items()}


def _line(name: str, data: dict[str, Any], event_id: str = "") -> str:
    number = f"id: {event_id}\n" if event_id else ""
    return f"{number}event: {name}\ndata: {json.dumps(data)}\n\n"
