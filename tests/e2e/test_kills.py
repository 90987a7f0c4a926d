"""kill -9 in mid-run: accepted work is answered all the same."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support import Offramp, offramp_up, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
BODY = {"label": "dress", "n": 16, "seed": 3, "steps": 60, "gear": "full", "deadline_ms": 180_000}


def pids(service: Offramp, part: str) -> list[int]:
    """Process ids that `offramp up` has announced for a part."""
    return [int(found) for found in re.findall(rf"^{part} +pid (\d+)", service.log.read_text(), re.MULTILINE)]


def post(service: Offramp) -> httpx.Response:
    return httpx.post(f"{service.url}/generate", json=BODY, timeout=200)


def busy(service: Offramp) -> bool:
    """Whether the worker has rows in slots."""
    try:
        text = httpx.get(service.worker_metrics_url).text
    except httpx.HTTPError:
        return False
    found = re.search(r'offramp_slots\{model="fashion-dit",state="busy"\} ([0-9.]+)', text)
    return found is not None and float(found[1]) > 0


@pytest.mark.parametrize("part", ["worker", "store"])
def test_a_request_in_flight_survives_kill_9(tmp_path: Path, part: str):
    with offramp_up(tmp_path, LEASE_S="2") as service, ThreadPoolExecutor(1) as pool:
        expected = post(service)
        assert expected.status_code == 200, expected.text
        waiting = pool.submit(post, service)
        wait_for("the job to run", lambda: busy(service))
        [pid] = pids(service, part)
        os.kill(pid, signal.SIGKILL)
        answer = waiting.result(timeout=200)
        assert answer.status_code == 200, answer.text + service.log.read_text()
        assert [i["b64"] for i in answer.json()["images"]] == [i["b64"] for i in expected.json()["images"]]
        assert len(pids(service, part)) == 2
