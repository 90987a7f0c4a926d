from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import pytest
from redis import Redis

from service.broker.redis_streams import Broker
from tests.support import require


@pytest.fixture(scope="session")
def redis_server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's redis-server, so that the scripts meet both families."""
    binary = require("redis-server")
    assert shutil.which(binary)
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "r.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    url = f"unix://{socket}"
    deadline = time.monotonic() + 20
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with Redis.from_url(url) as client:
        client.ping()
    yield url
    server.terminate()
    server.wait(10)


@pytest.fixture(params=["valkey", "redis"])
def server_url(request: pytest.FixtureRequest) -> str:
    name = {"valkey": "valkey_url", "redis": "redis_server_url"}[request.param]
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
