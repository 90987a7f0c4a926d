"""Gears under load with the shipped models, over real HTTP: what the receipts say."""

from __future__ import annotations

import base64
import io
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support import Offramp

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
JOBS, ROWS, MANY = 24, 4, 64


@pytest.fixture
def http(offramp_up: Offramp) -> Any:
    with httpx.Client(base_url=offramp_up.url, timeout=120, trust_env=False) as client:
        yield client


def drawn(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/generate", json={"model": "fashion-dit", "n": ROWS, "label": 0, **body})


def judged(http: httpx.Client, seed: int = 0, images: int = MANY, **body: Any) -> httpx.Response:
    return http.post("/classify", json={"images": [noise(64 * seed + i) for i in range(images)], **body})


def noise(seed: int) -> str:
    buffer = io.BytesIO()
    Image.frombytes("L", (28, 28), random.Random(seed).randbytes(28 * 28)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def alone_ms(ask: Callable[..., httpx.Response], **body: Any) -> float:
    """How long one request takes when there is no other."""
    begun = time.monotonic()
    assert ask(**body).status_code == 200
    return 1000 * (time.monotonic() - begun)


def burst(
    ask: Callable[..., httpx.Response], budget_ms: int, floors: Sequence[str], **body: Any
) -> list[tuple[str, dict[str, Any]]]:
    """24 jobs at once; floor and receipt of those that were answered."""
    bodies = [{"seed": i, "deadline_ms": budget_ms, "floor": floors[i % len(floors)], **body} for i in range(JOBS)]
    with ThreadPoolExecutor(JOBS) as pool:
        answers = list(pool.map(lambda body: ask(**body), bodies))
    assert {answer.status_code for answer in answers} <= {200, 504}
    return [(b["floor"], a.json()["receipt"]) for a, b in zip(answers, bodies, strict=True) if a.status_code == 200]


def bursts(
    ask: Callable[..., httpx.Response], full_ms: float, floors: Sequence[str], **body: Any
) -> list[tuple[str, dict[str, Any]]]:
    """Budgets shrink until the best cannot keep them: when depends on the machine, what happens then does not."""
    good = list[tuple[str, dict[str, Any]]]()
    for share in (0.6, 0.4, 0.25, 0.15):
        good += burst(ask, round(full_ms * JOBS * share) + 500, floors, **body)
        if any(receipt["downgraded"] for _, receipt in good):
            break
    assert any(receipt["downgraded"] for _, receipt in good)
    assert {receipt["why"] for _, receipt in good if receipt["downgraded"]} <= {"load", "deadline"}
    assert {receipt["requested"] for _, receipt in good} == {"auto"}
    return good


def test_under_load_answers_get_cheaper_down_to_their_floor_and_recover(http: httpx.Client) -> None:
    floors = {gear: drawn(http, gear=gear).json()["receipt"]["exit_depths"] for gear in ("full", "balanced", "eco")}
    ask = partial(drawn, http)
    for floor, receipt in bursts(ask, alone_ms(ask, gear="full"), ("eco", "balanced", "full"), gear="auto"):
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


def test_under_load_the_ensemble_is_for_fewer_pictures(http: httpx.Client) -> None:
    """Rungs below it are cascades; who names it as floor gets it for all, and after the crowd everybody does."""
    ask, whole = partial(judged, http), judged(http, method="ensemble").json()["receipt"]["cost_vs_single"]
    for floor, receipt in bursts(ask, alone_ms(ask, method="ensemble"), ("ensemble", "cascade"), method="auto"):
        assert receipt["downgraded"] == (receipt["method"] != "ensemble")
        assert receipt["method"] in (("ensemble",) if floor == "ensemble" else ("ensemble", "cascade"))
        assert ("expected_cost" in receipt and receipt["expected_cost"] < whole) == receipt["downgraded"]
    time.sleep(10.0)
    assert judged(http, 99, method="auto", floor="bridge").json()["receipt"]["method"] == "ensemble"


def test_an_idle_service_gives_everybody_the_ensemble(http: httpx.Client) -> None:
    time.sleep(2.0)
    receipt = judged(http, images=1, method="auto", floor="bridge").json()["receipt"]
    assert (receipt["method"], receipt["requested"], receipt["downgraded"]) == ("ensemble", "auto", False)
    named = judged(http, images=1, method="single", floor="bridge")
    assert (named.status_code, named.json()["field"]) == (422, "floor")
