from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app
from tests.support import free_port, get_json, wait_for

COMMANDS = ("up", "gateway", "worker", "redis", "version", "train", "eval", "demo")


def offramp(*args: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "service.cli", *args],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(command in shown for command in COMMANDS)


def test_version(tmp_path: Path) -> None:
    run = offramp("version", cwd=tmp_path)
    assert run.returncode == 0
    assert f"offramp {version('offramp')}\n" in run.stdout


def test_unknown_command_is_refused(tmp_path: Path) -> None:
    assert offramp("fly", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("command", ["train", "eval"])
def test_missing_torch_is_explained(tmp_path: Path, command: str) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    run = offramp(command, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert run.returncode == 1
    assert f"offramp {command} needs torch: pip install" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("shadow", ["models/__init__.py", "models.py"])
def test_shadowed_package_is_refused(tmp_path: Path, shadow: str) -> None:
    (tmp_path / shadow).parent.mkdir(exist_ok=True)
    (tmp_path / shadow).touch()
    run = subprocess.run(
        [sys.executable, "-c", "from service.cli import main; main()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert f"the package 'models' is found at {tmp_path / shadow}" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.e2e
def test_gateway_starts_without_torch_and_without_redis(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OFFRAMP_PORT": str(port),
        "OFFRAMP_DATA_DIR": str(tmp_path / "data"),
    }
    with (tmp_path / "log").open("wb") as sink:
        gateway = subprocess.Popen(
            [sys.executable, "-P", "-m", "service.cli", "gateway"],
            env=environment,
            cwd=tmp_path,
            stdout=sink,
            stderr=sink,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for("/healthz", lambda: get_json(f"{url}/healthz") is not None)
        assert get_json(f"{url}/openapi.json")["info"]["title"] == "Offramp"
        assert get_json(f"{url}/readyz") is None
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        gateway.kill()
        gateway.wait()


@pytest.mark.e2e
def test_redis_prints_its_address_and_stops_cleanly(tmp_path: Path) -> None:
    environment = {**os.environ, "OFFRAMP_DATA_DIR": str(tmp_path / "data")}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "service.cli", "redis"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            variable, url = server.stdout.readline().strip().split("=", 1)
            assert variable == "OFFRAMP_REDIS_URL"
            socket_path = Path(url.removeprefix("unix://"))
            assert socket_path.is_socket()
            second = offramp("redis", cwd=tmp_path, OFFRAMP_DATA_DIR=str(tmp_path / "data"))
            assert second.returncode == 1
            assert "OFFRAMP_DATA_DIR" in second.stderr
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            assert not socket_path.exists()
        finally:
            server.kill()
