"""The three servers that every broker test runs on: Valkey 9, Redis 7 and Redis 6.2."""

from __future__ import annotations

import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from service.broker.redis_streams import Broker
from tests.support import old_redis, system_redis


@contextmanager
def running(binary: str, folder: Path, *more: str) -> Iterator[str]:
    """A server on a socket in `folder`."""
    socket = folder / "r.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([binary, *options, *more], stdout=subprocess.DEVNULL)
    url = f"unix://{socket}"
    try:
        with Redis.from_url(url) as client:
            for _ in range(400):
                try:
                    client.ping()
                    break
                except RedisConnectionError:
                    time.sleep(0.05)
            else:
                pytest.fail(f"{binary} does not answer")
        yield url
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="session")
def redis_server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(system_redis(), tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def old_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(old_redis(), tmp_path_factory.mktemp("redis6")) as url:
        yield url


@pytest.fixture(params=["valkey", "redis", "redis62"])
def server_url(request: pytest.FixtureRequest) -> str:
    name = {"valkey": "valkey_url", "redis": "redis_server_url", "redis62": "old_redis_url"}[request.param]
    found: str = request.getfixturevalue(name)
    return found


@pytest.fixture
async def broker(server_url: str) -> AsyncIterator[Broker]:
    made = Broker(server_url)
    await made.check()
    yield made
    await made.aclose()


@pytest.fixture
async def model(broker: Broker) -> str:
    """A model nobody else uses, its group made."""
    name = f"m-{uuid4().hex[:8]}"
    await broker.ensure(name)
    return name
