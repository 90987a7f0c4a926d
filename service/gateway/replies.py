"""Waiting for answers: one reader of the gateway's reply stream wakes the requests it names.

An answer lies under the result key; a wake-up brings it along where it is small, or says when to look. Every waiter
also looks by itself every `POLL_S`, so a lost wake-up costs delay and never an answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from service.broker.redis_streams import Broker
from service.errors import Cancelled, DeadlineExceeded, Unavailable
from service.protocol import Result

POLL_S = 2.0
BACKOFF_S = (0.05, 2.0)
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiter:
    """A request that waits: `look` is set when there is reason to look, `result` when the wake-up brought it, `gone`
    when nobody wants the answer any more."""

    look: asyncio.Event = field(default_factory=asyncio.Event)
    result: Result | None = None
    gone: bool = False


class Replies:
    """Wake-ups of one gateway; `async with` runs the reader of its stream."""

    def __init__(self, broker: Broker, gateway: str, poll_s: float = POLL_S) -> None:
        self._broker, self._gateway, self._poll_s = broker, gateway, poll_s
        self._waiting: dict[str, set[Waiter]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> Replies:
        self._stopping = False
        self._reader = asyncio.create_task(self._read(), name="replies")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop reading. On Python 3.11 wait_for may swallow a cancellation, hence the flag beside it."""
        self._stopping = True
        if self._reader:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    @contextmanager
    def expect(self, job_id: str) -> Iterator[Waiter]:
        """Register a job *before* it is submitted."""
        waiter, waiters = Waiter(), self._waiting.setdefault(job_id, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters:
                self._waiting.pop(job_id, None)

    async def result(self, waiter: Waiter, model: str, job_id: str, budget_s: float) -> Result:
        """The job's result; DeadlineExceeded after `budget_s` without one, whatever Redis does; Cancelled when the
        waiter is gone, Unavailable when the store has lost the job."""
        loop = asyncio.get_running_loop()
        end = loop.time() + budget_s
        while (left_s := end - loop.time()) > 0:
            timer = loop.call_later(min(self._poll_s, left_s), waiter.look.set)
            try:
                await waiter.look.wait()
            finally:
                timer.cancel()
            if waiter.result is not None:
                return waiter.result
            if waiter.gone:
                raise Cancelled("the client went away")
            waiter.look.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    if found := await self._look(model, job_id):
                        return found
        raise DeadlineExceeded("the deadline passed before the answer was ready", field="deadline_ms")

    async def _look(self, model: str, job_id: str) -> Result | None:
        """The result, if it is there; Unavailable when the store has lost the job, so that nobody waits for it."""
        try:
            found = await self._broker.result(model, job_id)
            known = found is not None or await self._broker.knows(model, job_id)
        except (Unavailable, RedisError):
            return None
        if not known:
            raise Unavailable("the store has lost the job: send the request again", retry_after_s=1)
        return found

    async def _read(self) -> None:
        """Pass wake-ups on; outages are waited out with back-off, then everybody looks for himself."""
        last, pause = "0", 0.0
        while not self._stopping:
            try:
                entries, last = await self._broker.replies(self._gateway, last)
            except Exception as error:  # whatever it is: a gateway that stops to listen answers late for ever
                if not pause:
                    log.warning("reply stream unreadable, retrying: %s", error)
                pause = min(max(2 * pause, BACKOFF_S[0]), BACKOFF_S[1])
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                continue
            if pause:
                log.info("reply stream readable again")
                pause = 0.0
                self._wake((job_id, None) for job_id in self._waiting)
            self._wake(entries)

    def _wake(self, over: Iterable[tuple[str, Result | None]]) -> None:
        for job_id, result in over:
            for waiter in self._waiting.get(job_id, ()):
                waiter.result = result
                waiter.look.set()
