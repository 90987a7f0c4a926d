"""What every side of the broker works on: the connection, and the Lua scripts of the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from service.broker import keys
from service.broker.connection import NEEDED, connect, reachable, refuse_unfit

LUA = Path(__file__).parent / "lua"
ALIVE_MS = 15_000


class Store:
    """One process's connection; `url` is redis://, rediss:// or unix://."""

    def __init__(self, url: str) -> None:
        self._redis: Redis = connect(url)
        self._token = uuid4().hex[:8]
        common = (LUA / "common.lua").read_text()
        self._scripts = {
            path.stem: self._redis.register_script((common if path.stem != "bucket" else "") + path.read_text())
            for path in LUA.glob("*.lua")
            if path.stem != "common"
        }

    async def _run(self, script: str, model: str, *args: str | int | bytes) -> Any:
        """One script on a model's slot."""
        return await self._scripts[script](keys=[keys.prefix(model)], args=args)

    @reachable
    async def check(self) -> None:
        """Refuse a server that would lose work: too old, free to evict keys, or without a command that is needed."""
        known = {as_bytes(one[0]).decode() for one in await self._redis.execute_command("COMMAND INFO", *NEEDED) if one}
        refuse_unfit(await self._redis.info(), [name for name in NEEDED if name not in known])

    async def aclose(self) -> None:
        """Close every connection."""
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


def entries(found: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Entries of a one-stream XREAD answer; none when it timed out."""
    return [(entry, fields) for _, lines in found or [] for entry, fields in lines]
