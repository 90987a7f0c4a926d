"""The embedded server: durable, alone on its folder, gone with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.broker.embedded import Embedded
from service.broker.redis_streams import Broker
from service.errors import Unavailable
from service.protocol import Terms
from tests.service.broker.jobs import job
from tests.support import wait_for


def gone(pid: int) -> bool:
    """Whether a process is no more, or only a zombie."""
    try:
        with Path(f"/proc/{pid}/stat").open() as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def server(tmp_path):
    made = Embedded(tmp_path)
    made.start()
    yield made
    made.stop()


async def test_queued_jobs_survive_sigkill(server):
    broker = Broker(server.url)
    await broker.ensure("m")
    sent = job("m")
    await broker.submit(sent, Terms(1, 30_000, 1000))
    os.kill(server.pid, signal.SIGKILL)
    wait_for("the server to die", lambda: not server.alive())
    with pytest.raises(Unavailable):
        await broker.queue_stats("m")
    server.start()
    [delivery] = (await broker.take("m", "w", 1, 1, 60_000)).deliveries
    assert delivery.job == sent
    await broker.aclose()


async def test_jobs_survive_an_orderly_restart(server):
    broker = Broker(server.url)
    await broker.submit(job("m"), Terms(1, 30_000, 1000))
    server.stop()
    server.start()
    assert (await broker.queue_stats("m")).jobs == 1
    await broker.aclose()


def test_a_second_server_on_the_folder_is_refused(server):
    with pytest.raises(Unavailable, match="OFFRAMP_DATA_DIR"):
        Embedded(server.data_dir).start()


def test_starting_twice_is_one_server(server):
    first = server.pid
    server.start()
    assert server.pid == first


def test_the_server_itself_holds_the_folder(server):
    """Where a server outlives its parent (macOS), a second one must not write to the same files."""
    assert server._lock is not None
    server._lock.close()
    with pytest.raises(Unavailable, match="OFFRAMP_DATA_DIR"):
        Embedded(server.data_dir).start()


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path):
    server = Embedded(tmp_path)
    server.socket.parent.mkdir(mode=0o700)
    server.socket.parent.chmod(0o777)
    try:
        with pytest.raises(Unavailable, match="not a private folder"):
            server.start()
    finally:
        server.socket.parent.rmdir()
        server.stop()


def test_the_folder_is_free_after_stop(tmp_path):
    for _ in range(2):
        server = Embedded(tmp_path)
        server.start()
        assert server.alive()
        server.stop()
        assert not server.alive()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_it_dies_with_its_parent(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from service.broker.embedded import Embedded\n"
        f"e = Embedded(Path({str(tmp_path)!r})); e.start(); print(e.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_for("the server to die with its parent", lambda: gone(pid))
