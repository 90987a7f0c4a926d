"""`offramp up`: what dies comes back, requests survive it, and nothing outlives the supervisor."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import pytest

from service.config import ConfigError
from service.errors import Unavailable
from service.supervisor import HEALTHY_S, Watch, base_url, check_port, restart_pause
from tests.service.worker.processes import environment, running, toy_models
from tests.support import wait_for


class Clockwork:
    """A part and a clock that do as they are told."""

    def __init__(self) -> None:
        self.now, self.starts, self.up, self.able = 0.0, 0, True, True
        self.pid = 1

    def start(self) -> None:
        if not self.able:
            raise Unavailable("not today")
        self.starts += 1
        self.up = True

    def alive(self) -> bool:
        return self.up

    def clock(self) -> float:
        return self.now


def watch(part: Clockwork) -> tuple[Watch, list[str]]:
    said: list[str] = []
    return Watch("part", part, said.append, part.clock), said


def test_death_after_a_healthy_life_is_mended_at_once() -> None:
    part = Clockwork()
    watched, said = watch(part)
    part.now, part.up = HEALTHY_S, False
    watched.tend()
    assert part.starts == 1
    assert said == ["part     died; restarting", "part     pid 1"]


def test_crash_loop_backs_off_to_thirty_seconds() -> None:
    part = Clockwork()
    watched, _ = watch(part)
    pauses = []
    for _ in range(9):
        part.up = False
        died, before = part.now, part.starts
        while part.starts == before:
            watched.tend()
            part.now += 0.25
        pauses.append(part.now - 0.25 - died)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_part_that_does_not_start_is_tried_again() -> None:
    part = Clockwork()
    watched, said = watch(part)
    part.up = part.able = False
    while len(said) < 3:
        watched.tend()
        part.now += 0.25
    part.able = True
    while not part.starts:
        watched.tend()
        part.now += 0.25
    assert "does not start: not today" in said[1]


def test_living_part_is_left_alone() -> None:
    part = Clockwork()
    watched, said = watch(part)
    watched.tend()
    assert (part.starts, said) == (0, [])


def test_pause_is_bounded() -> None:
    assert restart_pause(0) == 0.0
    assert restart_pause(1000) == 30.0


def test_taken_port_names_its_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"OFFRAMP_PORT={port}"):
            check_port("OFFRAMP_PORT", "127.0.0.1", port)
    check_port("OFFRAMP_PORT", "127.0.0.1", port)


def test_address_that_a_client_can_use() -> None:
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"


@contextmanager
def up(folder: Path, **settings: str) -> Iterator[SimpleNamespace]:
    """`offramp up` with toy models, ready."""
    models = folder / "models"
    if not models.exists():
        toy_models(models)
    env = environment(models, data_dir=str(folder / "data"), lease_s="2", **settings)
    log = folder / f"up-{len(list(folder.glob('up-*.log')))}.log"
    with running("up", env, log) as process:

        def line(name: str) -> int:
            """Latest process id of a part, from what the supervisor prints."""
            found = re.findall(rf"^{name} +pid (\d+)", log.read_text(), re.MULTILINE)
            return int(found[-1]) if found else 0

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "\nready " in log.read_text()

        wait_for("offramp up", ready)
        url = f"http://127.0.0.1:{env['OFFRAMP_PORT']}"
        yield SimpleNamespace(process=process, url=url, pid=line, log=log)


def generate(url: str, **body: Any) -> Any:
    request = Request(
        f"{url}/generate", json.dumps({"label": 0, **body}).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=90) as response:
        return json.load(response)


def stepping(service: SimpleNamespace) -> bool:
    """Whether some row is in flight, by the store's own account."""
    with urlopen(f"{service.url}/metrics", timeout=10) as response:
        return bool(re.search(r'^offramp_queue_jobs\{model="toy"\} [1-9]', response.read().decode(), re.MULTILINE))


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}/status").exists() else False


def drained(service: SimpleNamespace) -> None:
    parts = [service.pid(name) for name in ("store", "gateway", "worker")]
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0, service.log.read_text()
    assert all(gone(pid) for pid in parts)


@pytest.mark.e2e
def test_requests_survive_a_killed_worker_and_a_killed_store(tmp_path: Path) -> None:
    with up(tmp_path) as service, ThreadPoolExecutor(1) as client:
        for victim in ("worker", "store"):
            answer = client.submit(generate, service.url, n=2, steps=50, seed=1)
            wait_for("job in flight", lambda: stepping(service))
            if victim == "store":
                time.sleep(1.2)  # the append-only file is synced every second
            pid = service.pid(victim)
            os.kill(pid, signal.SIGKILL)
            wait_for(f"{victim} again", lambda victim=victim, pid=pid: service.pid(victim) not in (0, pid))
            assert [image["seed"] for image in answer.result(90)["images"]] == [1, 2]
        drained(service)


@pytest.mark.e2e
def test_ctrl_c_answers_what_is_in_flight(tmp_path: Path) -> None:
    with up(tmp_path) as service, ThreadPoolExecutor(1) as client:
        answer = client.submit(generate, service.url, steps=40, seed=3)
        wait_for("job in flight", lambda: stepping(service))
        drained(service)
        assert answer.result(10)["images"][0]["seed"] == 3


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with up(tmp_path) as service:
        parts = [service.pid(name) for name in ("store", "gateway", "worker")]
        service.process.kill()
        service.process.wait()
        wait_for("children to die", lambda: all(gone(pid) for pid in parts))
    with up(tmp_path) as service:
        drained(service)


@pytest.mark.e2e
def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with up(tmp_path) as service, ThreadPoolExecutor(1) as client:
        answer = client.submit(generate, service.url, steps=1000)
        wait_for("job in flight", lambda: stepping(service))
        parts = [service.pid(name) for name in ("store", "gateway", "worker")]
        service.process.send_signal(signal.SIGINT)
        wait_for("drain begun", lambda: "draining" in service.log.read_text())
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 1
        assert all(gone(pid) for pid in parts)
        assert isinstance(answer.exception(60), OSError)


def test_taken_port_refuses_to_boot(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = environment(toy_models(tmp_path / "models"), port=str(port), data_dir=str(tmp_path / "data"))
        run = subprocess.run(
            [sys.executable, "-P", "-m", "service.cli", "up"], env=env, capture_output=True, text=True, timeout=60
        )
    assert run.returncode == 1
    assert f"OFFRAMP_PORT={port}" in run.stderr
