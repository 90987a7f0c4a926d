from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.broker.together import MOST, Together


class Server:
    """Answers n with 10 n, an odd one with an error, one round trip at a time, when it is let."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.let, self.broken = asyncio.Event(), False

    async def __call__(self, calls: Sequence[int]) -> list[int | Exception]:
        self.rounds.append(list(calls))
        await self.let.wait()
        if self.broken:
            raise ConnectionError("gone")
        return [ValueError(str(n)) if n % 2 else 10 * n for n in calls]


async def test_calls_that_come_during_a_round_trip_share_the_next_and_get_their_own_answers() -> None:
    server = Server()
    ask = Together[int, int](server)
    asked = [asyncio.create_task(ask(0))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked += [asyncio.create_task(ask(n)) for n in range(1, MOST + 4)]
    await asyncio.sleep(0)
    server.let.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert server.rounds == [[0], list(range(1, MOST + 1)), list(range(MOST + 1, MOST + 4))]
    for n, answer in enumerate(answers):
        assert str(answer) == str(n) if n % 2 else answer == 10 * n
    assert await ask(8) == 80, "a new one is sent after a rest"


async def test_an_outage_is_everybodys_and_not_for_ever() -> None:
    server = Server()
    ask = Together[int, int](server)
    server.broken = True
    first = asyncio.create_task(ask(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(ask(n)) for n in range(2, 2 * MOST, 2)]
    await asyncio.sleep(0)
    server.let.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    assert all(isinstance(error, ConnectionError) for error in found)
    assert server.rounds == [[0]], "who waited for the same outage is not asked for"
    server.broken = False
    assert await ask(2) == 20


async def test_who_has_gone_is_not_asked_for_and_holds_nobody_up() -> None:
    server = Server()
    ask = Together[int, int](server)
    first = asyncio.create_task(ask(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gone, stays = asyncio.create_task(ask(2)), asyncio.create_task(ask(4))
    await asyncio.sleep(0)
    gone.cancel()
    first.cancel()
    await asyncio.sleep(0)
    server.let.set()
    assert await stays == 40
    assert server.rounds == [[0], [4]]
    with pytest.raises(asyncio.CancelledError):
        await gone
