"""The whole road with the shipped models: gateway, Valkey, worker, over real HTTP."""

from __future__ import annotations

import base64
import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from models.api import SolverName
from models.evaluation.classify import classify_images
from models.evaluation.metrics import auroc
from models.store import ZOO
from models.tasks.classify import load
from tests.support import Offramp

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]
TILE = 28


def sheet(name: str) -> np.ndarray:
    """Tiles of a shipped sheet, row by row: (N, 28, 28, 1)."""
    pixels = np.asarray(Image.open(ZOO / "samples" / name))
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    return pixels.reshape(rows, TILE, columns, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE, 1)


def png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def metric(service: Offramp, name: str, **labels: str) -> float:
    """Sum of a worker's samples `name` with these labels."""
    total = 0.0
    for line in httpx.get(service.worker_metrics_url).text.splitlines():
        if line.startswith(f"{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


@pytest.fixture(scope="module")
def client(offramp_up: Offramp):
    with httpx.Client(base_url=offramp_up.url, timeout=300) as made:
        yield made


def ask(client: httpx.Client, body: dict[str, Any], path: str = "/generate") -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def mixed_requests(n: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "label": rng.randrange(10),
            "n": rng.choice([1, 1, 2]),
            "seed": rng.randrange(2**53),
            "steps": rng.randint(3, 12),
            "solver": rng.choice(get_args(SolverName)),
            "guidance": rng.choice([1.0, 2.0, 3.0]),
            "gear": rng.choice(["full", "balanced", "eco"]),
        }
        for _ in range(n)
    ]


def test_concurrent_requests_give_the_pixels_of_requests_one_at_a_time(client, offramp_up):
    requests = mixed_requests(32)
    alone = [ask(client, body) for body in requests]
    before = metric(offramp_up, "offramp_mixed_ticks_total", model="fashion-dit")
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: ask(client, body), requests))
    assert metric(offramp_up, "offramp_mixed_ticks_total", model="fashion-dit") > before
    for body, one, other in zip(requests, alone, together, strict=True):
        assert [i["b64"] for i in one["images"]] == [i["b64"] for i in other["images"]], body
        assert one["receipt"] == other["receipt"]


def test_receipt_and_metrics_agree(client, offramp_up):
    def counted(kind: str) -> float:
        return metric(offramp_up, "offramp_layer_evals_total", model="fashion-dit", kind=kind)

    before = counted("run"), counted("skipped")
    receipt = ask(client, {"label": "bag", "n": 3, "gear": "eco", "steps": 8, "seed": 1})["receipt"]
    assert len(receipt["exit_depths"]) == 8
    assert receipt["layer_evals"] == 3 * 2 * sum(receipt["exit_depths"])
    assert receipt["layer_evals_full"] == 3 * 2 * 8 * receipt["depth"]
    assert receipt["overrides"] == ["steps"]
    assert counted("run") - before[0] == receipt["layer_evals"]
    assert counted("skipped") - before[1] == receipt["layer_evals_full"] - receipt["layer_evals"]


def test_lighter_gears_cost_less(client):
    saved = {
        gear: ask(client, {"label": 0, "seed": 5, "gear": gear})["receipt"]["compute_saved"]
        for gear in ("full", "balanced", "eco")
    }
    assert saved["full"] == 0
    assert saved["balanced"] >= 0.20
    assert saved["eco"] >= 0.35


def test_a_picture_for_those_who_ask_for_one(client):
    answer = client.post("/generate", json={"label": "sneaker", "n": 4, "seed": 1}, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert picture.shape[0] >= 2 * TILE
    assert picture.std() > 20


def test_samples_look_like_their_label_to_the_classifier(client):
    right = 0
    for label in range(10):
        images = ask(client, {"label": label, "n": 4, "seed": 10 * label})["images"]
        results = ask(client, {"images": [i["b64"] for i in images], "method": "ensemble"}, "/classify")["results"]
        right += sum(r["index"] == label for r in results)
    assert right >= 32


@pytest.mark.parametrize("method", ["single", "bridge", "ensemble"])
def test_classify_over_http_equals_the_evaluation_in_process(client, method):
    images, labels = sheet("fashion-test.png"), np.repeat(np.arange(10), 20)
    results = []
    for i in range(0, 200, 50):
        body = {"images": [png(image) for image in images[i : i + 50]], "method": method}
        results += ask(client, body, "/classify")["results"]
    reference = classify_images(load(ZOO / "fashion-ensemble", 64, "cpu"), method, images)
    for found, expected in zip(results, reference, strict=True):
        assert list(found["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6)
        assert set(found["uncertainty"]) == set(expected.uncertainty)
        for key, value in expected.uncertainty.items():
            assert found["uncertainty"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    accuracy = np.mean([r["index"] == y for r, y in zip(results, labels, strict=True)])
    assert accuracy == np.mean([np.argmax(r.probabilities) == y for r, y in zip(reference, labels, strict=True)])
    assert accuracy > 0.85


@pytest.mark.parametrize("method", ["single", "bridge", "ensemble"])
def test_entropy_ranks_digits_above_clothes(client, method):
    def entropies(name: str, limit: int) -> np.ndarray:
        body = {"images": [png(image) for image in sheet(name)[:limit]], "method": method}
        return np.array([r["uncertainty"]["entropy"] for r in ask(client, body, "/classify")["results"]])

    found = auroc(entropies("digits-ood.png", 20), entropies("fashion-test.png", 64))
    print(f"AUROC of entropy, digits against clothes, {method}: {found:.3f}")
    assert found > 0.6


def test_models_are_listed_with_their_cards(client):
    listed = client.get("/models").json()
    assert "fashion-dit" in str(listed)
    generator = client.get("/models/fashion-dit").json()
    assert [g["name"] for g in generator["gears"]] == ["full", "balanced", "eco"]
    assert set(client.get("/models/fashion-ensemble").json()["methods"]) == {"single", "bridge", "ensemble"}


def test_the_shipped_weights_stay_small():
    size = sum(path.stat().st_size for path in Path(ZOO).rglob("*.safetensors"))
    assert 0 < size <= 40_000_000
