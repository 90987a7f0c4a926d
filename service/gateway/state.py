"""What the routes of one gateway share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from models.api import ModelInfo
from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import OfframpError, Unavailable
from service.gateway.replies import Replies
from service.gateway.shedding import Flows
from service.keys import Keyring
from service.metrics import GatewayMetrics

CATALOGUE_TTL_S = 1.0
READ_S = 1.0


class Catalogue:
    """The models that workers advertise, read from Redis at most once a second."""

    def __init__(self, broker: Broker, ttl_s: float = CATALOGUE_TTL_S) -> None:
        self._broker, self._ttl_s = broker, ttl_s
        self._infos: dict[str, ModelInfo] = {}
        self._error: OfframpError | None = None
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    async def infos(self) -> dict[str, ModelInfo]:
        """Models by name, at most `ttl_s` old; so is the memory of an outage: requests do not queue for it."""
        async with self._lock:
            if time.monotonic() - self._read_at >= self._ttl_s:
                try:
                    async with asyncio.timeout(READ_S):
                        self._infos, self._error = await self._broker.catalogue(), None
                except OfframpError as error:
                    self._error = error
                except TimeoutError:
                    self._error = None if self._infos else Unavailable("Redis does not answer", retry_after_s=1)
                self._read_at = time.monotonic()
            if self._error is not None:
                raise self._error
            return self._infos

    def knows(self, model: str) -> bool:
        """Whether the last reading listed `model`: only such names become metric labels."""
        return model in self._infos


@dataclass(frozen=True)
class Gateway:
    """One gateway process; `id` names its reply stream."""

    id: str
    settings: Settings
    broker: Broker
    replies: Replies
    catalogue: Catalogue
    metrics: GatewayMetrics
    keys: Keyring
    flows: Flows
