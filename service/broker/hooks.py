"""A gateway's chores: webhooks that are due, and jobs that no worker is left to end.

Both are sorted sets per model: webhooks by the time of the next try, entries by their deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.broker import keys
from service.broker.connection import reachable
from service.broker.jobs import Wake
from service.broker.letters import Letters
from service.broker.store import as_bytes


@dataclass(frozen=True)
class Hook:
    """A URL to tell of a job's end, for the `tries`th time."""

    id: str
    url: str
    outcome: str
    tries: int


class Hooks(Letters):
    """What any gateway does for all of them."""

    @reachable
    async def models(self) -> list[str]:
        """Every model that was ever advertised, served now or not."""
        return sorted(as_bytes(name).decode() for name in await self._redis.hkeys(keys.CATALOGUE))

    @reachable
    async def expire(self, model: str, lease_ms: int, ttl_s: int, grace_ms: int) -> list[str]:
        """End jobs that are overdue by `grace_ms` and that no worker holds, and wake whoever waits; 100 ids at most."""
        ended = await self._run("expire", model, grace_ms, lease_ms, ttl_s)
        wakes = [Wake(tuple(gateways.decode().split()), name.decode()) for name, gateways in ended]
        await self.notify(wakes)
        return [wake.id for wake in wakes]

    @reachable
    async def due_hooks(self, model: str, lease_ms: int, count: int = 20) -> list[Hook]:
        """Take hooks that are due; a taker that goes silent for `lease_ms` has them taken again."""
        found = await self._run("hooks", model, lease_ms, count)
        return [Hook(name.decode(), url.decode(), outcome.decode(), int(tries)) for name, url, outcome, tries in found]

    @reachable
    async def hook_over(self, model: str, job_id: str) -> None:
        """It was told, or given up."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.hooks(model), job_id)
            pipe.delete(keys.hook(model, job_id))
            await pipe.execute()

    @reachable
    async def hook_again(self, model: str, job_id: str, in_ms: int) -> None:
        """Try once more after `in_ms`."""
        await self._redis.zadd(keys.hooks(model), {job_id: await self._now_ms() + in_ms}, xx=True)
