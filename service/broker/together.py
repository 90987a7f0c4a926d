"""Calls of many tasks in few round trips."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

C = TypeVar("C")
A = TypeVar("A")
MOST = 64


class Together(Generic[C, A]):
    """One round trip at a time: calls that come while it is under way share the next one, `MOST` at most.

    An idle server is asked at once; a busy one is asked seldom, for many. `run` answers a list of calls in order, an
    exception in place of an answer that has none. One that it raises is everybody's, those who wait for the next round
    trip included: nobody has to wait for an outage twice. A call whose caller has gone before it was sent is not sent.
    """

    def __init__(self, run: Callable[[Sequence[C]], Awaitable[Sequence[A | Exception]]]) -> None:
        self._run = run
        self._waiting: list[tuple[C, asyncio.Future[A]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def __call__(self, call: C) -> A:
        """The answer to one call."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answer))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await answer

    async def _send(self) -> None:
        try:
            while self._waiting:
                now, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                if wanted := [one for one in now if not one[1].done()]:
                    await self._round(wanted)
        finally:
            self._sender = None

    async def _round(self, wanted: Sequence[tuple[C, asyncio.Future[A]]]) -> None:
        answers: Sequence[A | Exception]
        try:
            answers = await self._run([call for call, _ in wanted])
        except Exception as error:
            wanted, self._waiting = [*wanted, *self._waiting], []
            answers = [error] * len(wanted)
        for (_, future), answer in zip(wanted, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
