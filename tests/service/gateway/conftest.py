from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from redis.asyncio import Redis

from tests.service.gateway.receiver import Receiver
from tests.service.gateway.serving import Held, Worker, client, echo


@pytest.fixture
async def redis(valkey_url: str) -> AsyncIterator[Redis]:
    """A client of an emptied server."""
    async with Redis.from_url(valkey_url) as found:
        await found.flushall()
        yield found


@pytest.fixture
async def worker(redis: Redis, valkey_url: str) -> AsyncIterator[Worker]:
    """A worker's double that answers everything."""
    async with Worker(valkey_url, echo) as found:
        yield found


@pytest.fixture
async def http(worker: Worker, valkey_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway whose jobs `worker` answers."""
    async with client(valkey_url, max_body_bytes=100_000, max_pixels=1_000_000) as found:
        yield found


@pytest.fixture
async def held(redis: Redis, valkey_url: str) -> AsyncIterator[Held]:
    found = Held(valkey_url)
    async with Worker(valkey_url, found):
        yield found
    await found.broker.aclose()


@pytest.fixture
async def held_http(held: Held, valkey_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with client(valkey_url) as found:
        yield found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()
