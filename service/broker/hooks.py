"""Webhooks that are due: a sorted set per model by the time of the next try, filled by whatever ends a job."""

from __future__ import annotations

from dataclasses import dataclass

from service.broker import keys
from service.broker.connection import reachable
from service.broker.letters import Letters


@dataclass(frozen=True)
class Hook:
    """A URL to tell of a job's end, for the `tries`th time."""

    id: str
    url: str
    outcome: str
    tries: int


class Hooks(Letters):
    """A gateway's list of calls to make."""

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
