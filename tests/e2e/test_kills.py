"""kill -9 in mid-run: accepted work is answered all the same."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import Offramp, offramp_up, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
SAVED = 'offramp_checkpoints_total{model="fashion-dit"}'
BODY: dict[str, Any] = {"label": "dress", "n": 16, "seed": 3, "steps": 60, "gear": "full", "deadline_ms": 180_000}


def pids(service: Offramp, part: str) -> list[int]:
    """Process ids that `offramp up` has announced for a part."""
    return [int(found) for found in re.findall(rf"^{part} +pid (\d+)", service.log.read_text(), re.MULTILINE)]


def post(service: Offramp) -> httpx.Response:
    return httpx.post(f"{service.url}/generate", json=BODY, timeout=200)


def value(service: Offramp, series: str) -> float:
    """A number of the worker; 0 while it is away."""
    try:
        text = httpx.get(service.worker_metrics_url).text
    except httpx.HTTPError:
        return 0.0
    found = re.search(rf"^{re.escape(series)} ([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("part", ["worker", "store"])
def test_a_request_in_flight_survives_kill_9(tmp_path: Path, part: str):
    with offramp_up(tmp_path, LEASE_S="2") as service, ThreadPoolExecutor(1) as pool:
        expected = post(service)
        assert expected.status_code == 200, expected.text
        saved = value(service, SAVED)
        waiting = pool.submit(post, service)
        wait_for("its rows to be saved", lambda: value(service, SAVED) >= BODY["n"] + saved, pause=0.05)
        [pid] = pids(service, part)
        os.kill(pid, signal.SIGKILL)
        answer = waiting.result(timeout=200)
        assert answer.status_code == 200, answer.text + service.log.read_text()
        assert [i["b64"] for i in answer.json()["images"]] == [i["b64"] for i in expected.json()["images"]]
        assert len(pids(service, part)) == 2
        if part == "worker":
            assert value(service, 'offramp_rows_restored_total{model="fashion-dit"}') == BODY["n"]
