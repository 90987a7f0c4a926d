"""Ending jobs that are overdue where no worker lives to do it: any gateway does it for all models."""

from __future__ import annotations

import asyncio
import logging
import random

from redis.exceptions import RedisError

from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import OfframpError

LOOK_S = 2.0
GRACE_MS = 2000
log = logging.getLogger(__name__)


class Expiry:
    """Looks for overdue jobs about every `LOOK_S` seconds; `async with` runs it."""

    def __init__(self, broker: Broker, settings: Settings) -> None:
        self._broker, self._lease_ms, self._ttl_s = broker, round(1000 * settings.lease_s), settings.result_ttl_s
        self._runner: asyncio.Task[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> Expiry:
        self._stopping = False
        self._runner = asyncio.create_task(self._run(), name="expiry")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        if self._runner:
            self._runner.cancel()
            await asyncio.wait([self._runner])

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await self._look()
            except (OfframpError, RedisError) as error:
                log.debug("overdue jobs wait: %s", error)
            except Exception:
                log.exception("overdue jobs cannot be ended")
            await asyncio.sleep(LOOK_S * random.uniform(0.75, 1.25))

    async def _look(self) -> None:
        for model in await self._broker.models():
            while ended := await self._broker.expire(model, self._lease_ms, self._ttl_s, GRACE_MS):
                log.info("jobs expired without a worker", extra={"model": model, "jobs": len(ended)})
