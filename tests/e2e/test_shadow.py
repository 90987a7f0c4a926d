"""Shadow quality with the shipped models: answers that a burst made cheaper are made again when it is over."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import Offramp, offramp_up, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
JOBS, ROWS, MODEL = 16, 3, "fashion-dit"


def series(service: Offramp) -> dict[tuple[str, ...], float]:
    """Values of the worker by name and the other labels in the order of their names."""
    text = httpx.get(service.worker_metrics_url, trust_env=False).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "model")): sample.value
        for sample in samples
        if sample.labels.get("model") == MODEL
    }


def burst(http: httpx.Client, budget_ms: int) -> list[dict[str, Any]]:
    """Receipts of many jobs at once."""
    body = {"model": MODEL, "n": ROWS, "label": 0, "gear": "auto", "floor": "eco", "deadline_ms": budget_ms}
    with ThreadPoolExecutor(JOBS) as pool:
        answers = list(pool.map(lambda i: http.post("/generate", json=body | {"seed": i}), range(JOBS)))
    return [answer.json()["receipt"] for answer in answers if answer.status_code == 200]


def downgraded(http: httpx.Client) -> list[dict[str, Any]]:
    """Receipts of bursts with less and less time, until some jobs were downgraded."""
    receipts: list[dict[str, Any]] = []
    begun = time.monotonic()
    assert http.post("/generate", json={"model": MODEL, "n": ROWS, "gear": "full"}).status_code == 200
    budget_ms = 1000 * (time.monotonic() - begun) * JOBS
    for _ in range(6):
        receipts += burst(http, round(budget_ms))
        if any(receipt["downgraded"] for receipt in receipts):
            return receipts
        budget_ms *= 0.6
    raise AssertionError(f"nothing was downgraded within {budget_ms:g} ms")


def test_downgraded_pictures_are_made_again_and_compared(tmp_path: Path) -> None:
    with (
        offramp_up(tmp_path, shadow_share="1") as service,
        httpx.Client(base_url=service.url, timeout=120, trust_env=False) as http,
    ):
        receipts = downgraded(http)
        wait_for("free slots", lambda: series(service)["offramp_slots", "busy"] == 0)
        before = series(service)
        assert sum(receipt["gear"] == "eco" for receipt in receipts) == before.get(
            ("offramp_jobs_by_gear_total", "true", "eco")
        )

        def compared() -> bool:
            found = series(service)
            return all(found["offramp_shadow_gap_count", kind] for kind in ("pixels", "class", "probabilities"))

        wait_for("a comparison", compared, 60)
        after = series(service)
        pixels = after["offramp_shadow_gap_sum", "pixels"] / after["offramp_shadow_gap_count", "pixels"]
        assert 0 < pixels < 0.3
        assert after["offramp_shadow_runs_total", "failed"] == 0
        nobodys = ("offramp_layer_evals_total", "offramp_tick_duration_seconds_count")
        assert {key: value for key, value in before.items() if key[0] in nobodys} == {
            key: value for key, value in after.items() if key[0] in nobodys
        }
        assert http.post("/generate", json={"model": MODEL, "n": 1, "seed": 3}).status_code == 200
