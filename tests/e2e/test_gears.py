"""Gears under load with the shipped models, over real HTTP: what the receipts say."""

from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support import Offramp

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
JOBS, ROWS = 24, 4


@pytest.fixture
def http(offramp_up: Offramp) -> Any:
    with httpx.Client(base_url=offramp_up.url, timeout=120, trust_env=False) as client:
        yield client


def drawn(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/generate", json={"model": "fashion-dit", "n": ROWS, "label": 0, **body})


def burst(http: httpx.Client, budget_ms: int) -> list[tuple[str, dict[str, Any]]]:
    """24 jobs at once; floor and receipt of those that were answered."""
    bodies = [
        {"seed": i, "deadline_ms": budget_ms, "gear": "auto", "floor": ("eco", "balanced", "full")[i % 3]}
        for i in range(JOBS)
    ]
    with ThreadPoolExecutor(JOBS) as pool:
        answers = list(pool.map(lambda body: drawn(http, **body), bodies))
    assert {answer.status_code for answer in answers} <= {200, 504}
    return [(b["floor"], a.json()["receipt"]) for a, b in zip(answers, bodies, strict=True) if a.status_code == 200]


def test_under_load_answers_get_cheaper_down_to_their_floor_and_recover(http: httpx.Client) -> None:
    """Budgets shrink until full cannot keep them: when that is depends on the machine, what happens then does not."""
    floors = {gear: drawn(http, gear=gear).json()["receipt"]["exit_depths"] for gear in ("full", "balanced", "eco")}
    begun = time.monotonic()
    assert drawn(http, gear="full").status_code == 200
    alone_ms, good = 1000 * (time.monotonic() - begun), list[tuple[str, dict[str, Any]]]()
    for share in (0.6, 0.4, 0.25, 0.15):
        good += burst(http, round(alone_ms * JOBS * share) + 500)
        if any(receipt["downgraded"] for _, receipt in good):
            break
    assert {receipt["why"] for _, receipt in good if receipt["downgraded"]} <= {"load", "deadline"}
    assert any(receipt["downgraded"] for _, receipt in good)
    for floor, receipt in good:
        assert receipt["requested"] == "auto"
        assert receipt["downgraded"] == (receipt["gear"] != "full")
        images = receipt["exit_depths"]
        for depths in images if isinstance(images[0], list) else [images]:
            assert all(ran >= least for ran, least in zip(depths, floors[floor], strict=True))
    time.sleep(10.0)
    assert drawn(http, seed=99).json()["receipt"]["gear"] == "full"


def test_an_idle_service_gives_the_best_that_the_request_allows(http: httpx.Client) -> None:
    time.sleep(5.0)
    assert drawn(http).json()["receipt"]["gear"] == "full"
    assert drawn(http, max_compute=0.65, floor="eco").json()["receipt"]["gear"] == "eco"
    assert drawn(http, max_compute=0.75).json()["receipt"]["gear"] == "balanced"
    refused = drawn(http, floor=0.99)
    assert (refused.status_code, refused.json()["field"]) == (422, "floor")


def test_classification_has_rungs_too(http: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("L", (28, 28), 128).save(buffer, "png")
    image = base64.b64encode(buffer.getvalue()).decode()
    time.sleep(2.0)
    receipt = http.post("/classify", json={"image": image, "method": "auto", "floor": "bridge"}).json()["receipt"]
    assert (receipt["method"], receipt["requested"], receipt["downgraded"]) == ("ensemble", "auto", False)
    named = http.post("/classify", json={"image": image, "method": "single", "floor": "bridge"})
    assert (named.status_code, named.json()["field"]) == (422, "floor")
