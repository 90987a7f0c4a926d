"""`offramp worker` as a process: SIGKILL, SIGTERM and what it says when it cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.request import urlopen
from uuid import uuid4

import pytest

from service.broker.redis_streams import Broker
from service.protocol import Job, Result, Terms
from tests.service.worker.processes import command, environment, running, toy_models
from tests.service.worker.work import draw
from tests.support import wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture
async def broker(valkey_url: str) -> AsyncIterator[Broker]:
    made = Broker(valkey_url)
    await made._redis.flushall()
    yield made
    await made.aclose()


@pytest.fixture
def env(valkey_url: str, tmp_path: Path) -> dict[str, str]:
    return environment(toy_models(tmp_path / "models"), redis_url=valkey_url, lease_s="2", slots="6")


async def submit(broker: Broker, job: Job) -> Job:
    await broker.submit(job, Terms(job.work.rows, 60_000, 10**9))
    return job


async def state(broker: Broker, job: Job) -> str:
    found = await broker._redis.hget(f"offramp:{{m:toy}}:job:{job.id}", "state")
    return found.decode() if found else ""


async def until_running(broker: Broker, job: Job) -> None:
    for _ in range(600):
        if await state(broker, job) == "running":
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the job never ran")


async def answer(broker: Broker, job: Job) -> Result:
    for _ in range(600):
        if found := await broker.result("toy", job.id):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("never answered")


async def test_job_of_a_killed_worker_is_answered_by_the_next(
    broker: Broker, env: dict[str, str], tmp_path: Path
) -> None:
    with running("worker", env, tmp_path / "first.log") as first:
        job = await submit(broker, draw(rows=2, steps=30))
        await until_running(broker, job)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert await broker.result("toy", job.id) is None
        with running("worker", env, tmp_path / "second.log") as second:
            result = await answer(broker, job)
            assert result.outcome == "ok"
            assert f"-{second.pid}-" in result.worker
    assert (await broker.queue_stats("toy")).ledger == {"accepted": 1, "ok": 1}


async def test_sigterm_drains(broker: Broker, env: dict[str, str], tmp_path: Path) -> None:
    with running("worker", env | {"OFFRAMP_SLOTS": "1"}, tmp_path / "worker.log") as worker:
        job = await submit(broker, draw(steps=20))
        await until_running(broker, job)
        worker.send_signal(signal.SIGTERM)
        later = await submit(broker, draw(steps=1))
        assert await asyncio.to_thread(worker.wait, 30) == 0
    result = await broker.result("toy", job.id)
    assert result is not None
    assert result.outcome == "ok"
    assert await state(broker, later) == "queued"
    assert await broker.live_workers("toy") == 0
    assert "msg=drained" in (tmp_path / "worker.log").read_text()


async def test_second_signal_leaves_the_entry_to_redelivery(
    broker: Broker, env: dict[str, str], tmp_path: Path
) -> None:
    with running("worker", env, tmp_path / "worker.log") as worker:
        job = await submit(broker, draw(steps=1000))
        await until_running(broker, job)
        worker.send_signal(signal.SIGTERM)
        wait_for("drain begun", lambda: "msg=draining" in (tmp_path / "worker.log").read_text())
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) == 128 + signal.SIGTERM
    assert (await broker.queue_stats("toy")).jobs == 1


async def test_metrics_and_both_models_are_served(broker: Broker, env: dict[str, str], tmp_path: Path) -> None:
    with running("worker", env, tmp_path / "worker.log"):
        job = await submit(broker, draw(steps=2))
        assert (await answer(broker, job)).outcome == "ok"
        url = f"http://127.0.0.1:{env['OFFRAMP_WORKER_METRICS_PORT']}/metrics"
        text = await asyncio.to_thread(page, url)
        for _ in range(600):
            if {"toy", "judge"} <= set(await broker.catalogue()):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("never announced")
    assert 'offramp_layer_evals_total{kind="run",model="toy"} 8.0' in text
    assert 'offramp_slots{model="judge",state="free"} 6.0' in text


def page(url: str) -> str:
    with urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
        return text


def refused(env: dict[str, str]) -> str:
    run = subprocess.run(command("worker"), env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    return run.stderr


def test_no_models_refuses_to_boot(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "OFFRAMP_MODELS" in refused(env | {"OFFRAMP_MODELS": str(tmp_path / "empty")})
    assert "OFFRAMP_MODELS" in refused(env | {"OFFRAMP_MODELS": str(tmp_path / uuid4().hex)})


def test_folder_that_does_not_load_is_named(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "models" / "toy" / "config.json").write_text('{"kind": "generator"}')
    assert str(tmp_path / "models" / "toy") in refused(env)


def test_two_models_of_one_name_are_refused(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "models" / "judge" / "config.json").write_text('{"kind": "ensemble", "name": "toy"}')
    assert "'toy'" in refused(env)


def test_taken_metrics_port_is_named(env: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"OFFRAMP_WORKER_METRICS_PORT={port}" in refused(env | {"OFFRAMP_WORKER_METRICS_PORT": str(port)})


def test_missing_torch_is_explained(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text("import torch")
    blocked = tmp_path / "site"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import sys\nfrom models.registry import TASKS\n"
        "sys.modules['torch'] = None\nTASKS['generate'] = TASKS['classify'] = 'toy:load'\n"
        f"sys.path.append({str(tmp_path)!r})\n"
    )
    assert "offramp[cpu]" in refused(env | {"PYTHONPATH": os.fspath(blocked)})
