"""What every side of the broker works on: the connection, and the Lua scripts of the protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from service.broker import keys
from service.broker.connection import BLOCK_MS, NEEDED, connect, reachable, refuse_unfit

Entry = tuple[bytes, dict[bytes, bytes]]
Command = Callable[..., Awaitable[Any]]
Call = tuple[str, Sequence[str | float | bytes]]

LUA = Path(__file__).parent / "lua"
ALIVE_MS = 15_000


@dataclass(frozen=True)
class Script:
    """A Lua script and the SHA-1 that servers know it by."""

    text: str
    sha: str

    @classmethod
    def read(cls, name: str, *before: str) -> Script:
        """lua/<name>.lua, after others that it needs."""
        text = "".join((LUA / f"{part}.lua").read_text() for part in (*before, name))
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


OF_A_MODEL = ("submit", "take", "heartbeat", "checkpoint", "finish", "release", "cancel", "expire", "status", "hooks")
SCRIPTS = {name: Script.read(name, "common") for name in OF_A_MODEL} | {"bucket": Script.read("bucket")}


class Store:
    """One process's connection; `url` is redis://, rediss:// or unix://."""

    def __init__(self, url: str) -> None:
        self._redis: Redis = connect(url)
        self._token = uuid4().hex[:8]
        self._command: Command = self._redis.execute_command
        self._clients: dict[str, Redis] = {}

    async def _run(self, script: str, model: str, *args: str | int | bytes) -> Any:
        """One script on a model's slot."""
        return await self._script(script, keys.prefix(model), *args)

    async def _script(self, script: str, key: str, *args: str | float | bytes, command: Command | None = None) -> Any:
        found, command = SCRIPTS[script], command or self._command
        try:
            return await command("EVALSHA", found.sha, 1, key, *args)
        except NoScriptError:
            return await command("EVAL", found.text, 1, key, *args)

    async def _scripts(self, script: str, calls: Sequence[Call]) -> list[Any]:
        """One script for several models and arguments, in one round trip; answers, or what went wrong, in order."""
        if len(calls) == 1:
            [(model, args)] = calls
            return [await self._script(script, keys.prefix(model), *args, command=self._own(script))]
        async with self._redis.pipeline(transaction=False) as pipe:
            for model, args in calls:
                pipe.execute_command("EVALSHA", SCRIPTS[script].sha, 1, keys.prefix(model), *args)
            answers = await pipe.execute(raise_on_error=False)
        return [
            await self._script(script, keys.prefix(model), *args) if isinstance(answer, NoScriptError) else answer
            for (model, args), answer in zip(calls, answers, strict=True)
        ]

    def _own(self, task: str) -> Command:
        """Commands of a task that has a connection to itself: one that blocks does not hold up the others, and no call
        goes through the pool."""
        client = self._clients.get(task)
        if client is None:
            client = self._clients[task] = self._redis.client()
        return client.execute_command

    async def _read(self, task: str, block_ms: int, count: int, streams: Mapping[str, str]) -> list[Entry]:
        """Entries past the ids of `streams`, waiting up to `block_ms` (a second at most) for the first."""
        block = max(1, min(block_ms, BLOCK_MS))
        names = ("STREAMS", *streams.keys(), *streams.values())
        return entries(await self._own(task)("XREAD", "BLOCK", block, "COUNT", count, *names))

    @reachable
    async def check(self) -> None:
        """Refuse a server that would lose work: too old, free to evict keys, or without a command that is needed."""
        known = {as_bytes(one[0]).decode() for one in await self._command("COMMAND INFO", *NEEDED) if one}
        refuse_unfit(await self._redis.info(), [name for name in NEEDED if name not in known])

    async def aclose(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            await client.aclose()
        await self._redis.aclose()

    async def _live(self, model: str) -> list[bytes]:
        oldest = await self._now_ms() - ALIVE_MS
        found: list[Any] = await self._redis.zrangebyscore(keys.workers(model), oldest, "+inf")
        return found

    async def _now_ms(self) -> int:
        seconds, micros = await self._redis.time()
        return int(seconds) * 1000 + int(micros) // 1000


def as_bytes(value: bytes | str) -> bytes:
    """What a client that decodes nothing answers."""
    return value if isinstance(value, bytes) else value.encode()


def entries(found: Any) -> list[Entry]:
    """Entries of all streams of an XREAD answer; none when it timed out."""
    return [(entry, fields) for _, lines in found or [] for entry, fields in lines]
