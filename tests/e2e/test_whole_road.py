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
METHODS = ["single", "exits", "distilled", "bridge", "bridges", "bridge_network", "ensemble", "cascade"]


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


@pytest.mark.parametrize("method", METHODS)
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
        assert found["decision"] == expected.decision
        for key, value in expected.uncertainty.items():
            assert found["uncertainty"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    accuracy = np.mean([r["index"] == y for r, y in zip(results, labels, strict=True)])
    assert accuracy == np.mean([np.argmax(r.probabilities) == y for r, y in zip(reference, labels, strict=True)])
    assert accuracy > 0.85


def classify_requests(n: int) -> list[dict[str, Any]]:
    """Requests of every method, cost and alpha, of 1 to 9 images."""
    rng, images = random.Random(3), sheet("fashion-test.png")
    options: list[dict[str, Any]] = [{"method": method} for method in METHODS]
    options += [{"max_cost": cost} for cost in (1.2, 1.6, 2.5, 9)]
    asked = [option | sets for option in options for sets in ({}, {"alpha": 0.1}, {"alpha": 0.01})]
    asked += [{"purify": draws, "method": method} for draws in (1, 3) for method in ("single", "ensemble")]
    return [
        {"images": [png(images[rng.randrange(len(images))]) for _ in range(rng.choice([1, 1, 2, 9]))]}
        | rng.choice(asked)
        for _ in range(n)
    ]


def assert_same_answers(one: dict[str, Any], other: dict[str, Any], body: dict[str, Any]) -> None:
    assert one["receipt"] == other["receipt"]
    for a, b in zip(one["results"], other["results"], strict=True):
        asked = {key: value for key, value in body.items() if key != "images"}
        assert list(a) == list(b), asked
        assert a["label"] == b["label"]
        assert (a.get("decision"), a.get("prediction_set")) == (b.get("decision"), b.get("prediction_set"))
        assert ("decision" in a) == ("purify" not in body)
        assert ("prediction_set" in a) == ("alpha" in body)
        assert list(a["probabilities"].values()) == pytest.approx(list(b["probabilities"].values()), rel=1e-4, abs=1e-6)
        assert a["uncertainty"] == pytest.approx(b["uncertainty"], rel=1e-3, abs=1e-5)


def test_a_mixed_flood_of_methods_gives_the_answers_of_requests_one_at_a_time(client, offramp_up):
    requests = classify_requests(40)
    alone = [ask(client, body, "/classify") for body in requests]
    before = metric(offramp_up, "offramp_mixed_ticks_total", model="fashion-ensemble")
    with ThreadPoolExecutor(40) as pool:
        together = list(pool.map(lambda body: ask(client, body, "/classify"), requests))
    assert metric(offramp_up, "offramp_mixed_ticks_total", model="fashion-ensemble") > before
    for body, one, other in zip(requests, alone, together, strict=True):
        assert_same_answers(one, other, body)


def test_sixty_four_files_are_answered_as_one_by_one_in_json(client, offramp_up):
    images, asked = sheet("fashion-test.png")[:192:3], {"max_cost": 2.5, "alpha": 0.05}
    files = [("files", (f"{i}.png", base64.b64decode(png(image)))) for i, image in enumerate(images)]
    before = metric(offramp_up, "offramp_decisions_total", model="fashion-ensemble", method="cascade")
    answer = client.post("/classify", files=files, data={key: str(value) for key, value in asked.items()})
    assert answer.status_code == 200, answer.text
    together, singles = answer.json(), [ask(client, {"image": png(i), **asked}, "/classify") for i in images]
    assert metric(offramp_up, "offramp_decisions_total", model="fashion-ensemble", method="cascade") == before + 128
    receipt = together["receipt"]
    assert receipt["image_costs"] == [single["receipt"]["cost_vs_single"] for single in singles]
    assert receipt["cost_vs_single"] == pytest.approx(np.mean(receipt["image_costs"]))
    assert 0 < len(receipt["escalated"]) < 64
    assert receipt["expected_cost"] <= 2.5
    whole = {"results": together["results"], "receipt": {}}
    assert_same_answers(whole, {"results": [r for s in singles for r in s["results"]], "receipt": {}}, asked)
    for i, result in enumerate(together["results"]):
        assert ("mutual_information" in result["uncertainty"]) == (i in receipt["escalated"])


def test_sets_hold_the_label_about_as_often_as_promised(client):
    images, labels = sheet("fashion-test.png"), np.repeat(np.arange(10), 20)
    names, held = client.get("/models/fashion-ensemble").json()["labels"], []
    for i in range(0, 200, 50):
        body = {"images": [png(image) for image in images[i : i + 50]], "alpha": 0.1}
        results = ask(client, body, "/classify")["results"]
        held += [names[y] in r["prediction_set"] for r, y in zip(results, labels[i : i + 50], strict=True)]
    assert 0.8 < np.mean(held) < 0.97


@pytest.mark.parametrize(
    ("asked", "field"),
    [({"alpha": 0}, "alpha"), ({"alpha": 1}, "alpha"), ({"max_cost": 0.3}, "max_cost"),
     ({"max_cost": 3, "method": "ensemble"}, "max_cost"), ({"purify": 2, "method": "cascade"}, "purify"),
     ({"purify": 2, "alpha": 0.1}, "alpha")],
)  # fmt: skip
def test_promises_that_cannot_be_kept_are_refused(client, asked, field):
    answer = client.post("/classify", json={"image": png(sheet("fashion-test.png")[0]), **asked})
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_purified_clothes_are_still_recognised_and_the_receipt_says_what_it_cost(client):
    images, labels = sheet("fashion-test.png")[::4], np.repeat(np.arange(10), 5)
    body = {"images": [png(image) for image in images], "method": "single", "purify": 2}
    answer, offered = ask(client, body, "/classify"), client.get("/models/fashion-ensemble").json()["purifier"]
    assert np.mean([r["index"] == y for r, y in zip(answer["results"], labels, strict=True)]) > 0.7
    assert answer["receipt"]["purified"] == {"u": offered["u"], "steps": offered["steps"], "draws": 2}
    assert answer["receipt"]["cost_vs_single"] == pytest.approx(2 * (offered["cost"] + 1))


@pytest.mark.parametrize("method", METHODS)
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
    assert set(client.get("/models/fashion-ensemble").json()["methods"]) == set(METHODS)


def test_the_shipped_weights_stay_small():
    size = sum(path.stat().st_size for path in Path(ZOO).rglob("*.safetensors"))
    assert 0 < size <= 40_000_000
