from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.config import ConfigError, Settings, load_settings


@pytest.mark.parametrize(
    ("variable", "value", "fix"),
    [
        ("OFFRAMP_PORT", "eighty", "valid integer"),
        ("OFFRAMP_PORT", "70000", "less than or equal to 65535"),
        ("OFFRAMP_SLOTS", "0", "greater than or equal to 1"),
        ("OFFRAMP_REDIS_URL", "http://localhost", "redis://, rediss:// or unix://"),
        ("OFFRAMP_DEVICE", "tpu", "auto|cpu|cuda"),
        ("OFFRAMP_LOG_LEVEL", "loud", "debug|info|warning|error"),
        ("OFFRAMP_LEASE_S", "nan", "less than or equal to 600"),
        ("OFFRAMP_DEADLINE_S", "-1", "greater than 0"),
    ],
)
def test_wrong_value_names_the_variable_and_the_fix(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, fix: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as refused:
        load_settings()
    assert f"{variable}={value!r}" in str(refused.value)
    assert fix in str(refused.value)


def test_every_wrong_value_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_PORT", "0")
    monkeypatch.setenv("OFFRAMP_SLOTS", "-3")
    with pytest.raises(ConfigError, match=r"(?s)OFFRAMP_PORT.*OFFRAMP_SLOTS"):
        load_settings()


@pytest.mark.parametrize("command", ["up", "gateway", "worker", "redis"])
def test_commands_refuse_to_boot(command: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-m", "service.cli", command],
        env={**os.environ, "OFFRAMP_PORT": "eighty"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    assert "OFFRAMP_PORT='eighty'" in run.stderr
    assert "Traceback" not in run.stderr


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFRAMP_SLOTS", "7")
    monkeypatch.setenv("OFFRAMP_REDIS_URL", "unix:///run/x.sock")
    settings = load_settings()
    assert (settings.slots, settings.redis_url) == (7, "unix:///run/x.sock")


def test_a_folder_without_models_refuses_to_boot(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_MODELS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"OFFRAMP_MODELS=.*folder that holds model folders"):
        load_settings()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert load_settings().models == tmp_path
