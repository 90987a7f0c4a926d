from __future__ import annotations

import json
from base64 import b64decode
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.service.gateway.serving import LABELS, Worker, b64, png

BOOT = png(Image.new("L", (28, 28), 77))


async def test_generate_answers_in_the_documented_shape(http: httpx.AsyncClient) -> None:
    body = {"model": "drawer", "label": "boot", "n": 2, "seed": 40, "steps": 7, "gear": "eco"}
    response = await http.post("/generate", json=body, headers={"X-Request-Id": "abc-1"})
    assert response.status_code == 200
    assert response.headers["X-Request-Id"] == "abc-1"
    answer = response.json()
    assert list(answer) == ["id", "model", "images", "receipt", "timings"]
    assert answer["id"].startswith("drawer.")
    assert [(image["label"], image["seed"]) for image in answer["images"]] == [("Boot", 40), ("Boot", 41)]
    assert [Image.open(BytesIO(b64decode(i["b64"]))).getpixel((0, 0)) for i in answer["images"]] == [40, 41]
    assert answer["receipt"] == {
        "gear": "eco", "solver": "ddim", "steps": 7, "depth": 4, "exit_depths": [[4] * 7] * 2, "layer_evals": 56,
        "layer_evals_full": 56, "compute_saved": 0.0, "overrides": ["steps"], "downgraded": False,
    }  # fmt: skip
    assert answer["timings"].keys() == {"queue_s", "run_s", "total_s"}
    assert (answer["timings"]["queue_s"], answer["timings"]["run_s"]) == (0.25, 0.5)


async def test_an_empty_request_takes_every_default(http: httpx.AsyncClient, worker: Worker) -> None:
    answer = (await http.post("/generate", json={})).json()
    assert answer["model"] == "drawer"
    assert answer["receipt"]["gear"] == "full"
    assert answer["images"][0]["label"] == LABELS[worker.seen[0].work.labels[0]]


@pytest.mark.parametrize(("accept", "kind"), [("image/png", "PNG"), ("image/webp", "WEBP"), ("image/*", "PNG")])
async def test_accept_returns_the_picture(http: httpx.AsyncClient, accept: str, kind: str) -> None:
    response = await http.post("/generate", json={"seed": 9}, headers={"Accept": accept})
    picture = Image.open(BytesIO(response.content))
    assert response.headers["Content-Type"] == f"image/{kind.lower()}"
    assert (picture.format, picture.size, picture.convert("L").getpixel((0, 0))) == (kind, (28, 28), 9)
    assert response.headers["Offramp-Seed"] == "9"
    assert response.headers["Offramp-Id"].startswith("drawer.")
    assert json.loads(response.headers["Offramp-Receipt"])["exit_depths"] == [4] * 5


@pytest.mark.parametrize(("accept", "kind"), [("image/png", "PNG"), ("image/webp", "WEBP")])
async def test_several_images_come_as_a_grid(http: httpx.AsyncClient, accept: str, kind: str) -> None:
    response = await http.post("/generate", json={"seed": 9, "n": 3}, headers={"Accept": accept})
    picture = Image.open(BytesIO(response.content))
    assert (picture.format, picture.size) == (kind, (56, 56))
    grey = np.asarray(picture.convert("L"))
    assert [grey[0, 0], grey[0, 28], grey[28, 0], grey[28, 28]] == [9, 10, 11, 0]


async def test_format_webp_decides_between_equal_pictures(http: httpx.AsyncClient) -> None:
    response = await http.post("/generate", json={"format": "webp"}, headers={"Accept": "image/*"})
    assert response.headers["Content-Type"] == "image/webp"


async def test_npy_holds_the_pixels(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/generate", json={"seed": 5, "format": "npy"})).json()
    pixels = np.load(BytesIO(b64decode(answer["images"][0]["b64"])), allow_pickle=False)
    assert (pixels.dtype, pixels.shape, pixels.max()) == (np.uint8, (28, 28, 1), 5)


async def test_a_receipt_too_long_for_a_header_loses_its_depths(http: httpx.AsyncClient) -> None:
    response = await http.post("/generate", json={"steps": 1000, "n": 3}, headers={"Accept": "image/png"})
    sent = json.loads(response.headers["Offramp-Receipt"])
    assert sent["steps"] == 1000
    assert "exit_depths" not in sent


async def test_classify_answers_in_the_documented_shape(http: httpx.AsyncClient, worker: Worker) -> None:
    response = await http.post("/classify", json={"image": b64(BOOT), "top_k": 2})
    assert response.status_code == 200
    answer = response.json()
    assert list(answer) == ["id", "model", "results", "receipt", "timings"]
    assert answer["results"] == [
        {
            "label": "T-shirt/top", "index": 0, "score": 0.5,
            "top_k": [
                {"label": "T-shirt/top", "index": 0, "score": 0.5},
                {"label": "Trouser", "index": 1, "score": 0.25},
            ],
            "probabilities": {"T-shirt/top": 0.5, "Trouser": 0.25, "Boot": 0.25},
            "uncertainty": {"entropy": 1.04},
            "decision": "escalate",
        }
    ]  # fmt: skip
    assert answer["receipt"] == {"method": "bridge", "downgraded": False, "cost_vs_single": 1.2}
    assert worker.seen[0].work.images == (bytes([77]) * 784,)


async def test_classify_takes_many_images_and_resizes_them(http: httpx.AsyncClient, worker: Worker) -> None:
    images = [BOOT, png(Image.new("RGB", (100, 50), "white"), "WEBP"), png(Image.new("L", (7, 7), 255), "JPEG")]
    answer = (await http.post("/classify", json={"images": [b64(i) for i in images], "method": "single"})).json()
    assert len(answer["results"]) == 3
    exact, wide, small = (np.frombuffer(i, np.uint8).reshape(28, 28) for i in worker.seen[0].work.images)
    assert set(exact.flat) == {77}
    assert (wide[:7].max(), wide[7:21].min(), wide[21:].max()) == (0, 255, 0)
    assert small.min() >= 250


async def test_a_set_of_names_for_those_who_ask_for_one(http: httpx.AsyncClient, worker: Worker) -> None:
    files, asked = [("file", ("a.png", BOOT))], {"method": "bridge", "alpha": "0.1"}
    for answer in (
        await http.post("/classify", json={"image": b64(BOOT), "method": "bridge", "alpha": 0.1}),
        await http.post("/classify", files=files, data=asked),
        await http.post("/classify", files=files, params=asked),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["prediction_set"] == ["Trouser", "T-shirt/top"]
    assert [job.work.alpha for job in worker.seen] == [0.1] * 3


async def test_a_cost_asks_for_a_cascade(http: httpx.AsyncClient, worker: Worker) -> None:
    for body in ({"max_cost": 1.2}, {"max_cost": 1.2, "method": "cascade"}, {"method": "cascade"}):
        answer = (await http.post("/classify", json={"image": b64(BOOT), **body})).json()
        assert answer["receipt"]["method"] == "cascade"
    assert [job.work.max_cost for job in worker.seen] == [1.2, 1.2, None]


async def test_purified_images_say_so_and_carry_no_decision(http: httpx.AsyncClient, worker: Worker) -> None:
    files = [("file", ("a.png", BOOT))]
    for answer in (
        await http.post("/classify", json={"image": b64(BOOT), "purify": 4}),
        await http.post("/classify", files=files, data={"purify": "4"}),
        await http.post("/classify", files=files, params={"purify": "4"}),
    ):
        assert answer.status_code == 200, answer.text
        assert answer.json()["receipt"]["purified"] == {"u": 0.3, "steps": 1, "draws": 4}
        assert not {"decision", "prediction_set"} & set(answer.json()["results"][0])
    assert [(job.work.purify, job.cost) for job in worker.seen] == [(4, 4 * (14 + 2))] * 3
    plain = (await http.post("/classify", json={"image": b64(BOOT)})).json()
    assert "purified" not in plain["receipt"]
    shown = (await http.get("/models/judge")).json()["purifier"]
    assert shown["model"] == "drawer"
    assert shown["methods"] == ["single", "bridge"]


async def test_what_was_not_calibrated_is_absent_not_null(http: httpx.AsyncClient, worker: Worker) -> None:
    [result] = (await http.post("/classify", json={"image": b64(BOOT), "method": "single"})).json()["results"]
    assert not {"decision", "prediction_set"} & set(result)


async def test_a_model_shows_what_its_methods_promise(http: httpx.AsyncClient, worker: Worker) -> None:
    model = (await http.get("/models/judge")).json()
    assert model["decisions"]["bridge"]["target"] == "coverage_at_risk"
    assert model["decisions"]["bridge"]["abstain"] is None
    assert model["sets"]["bridge"]["smallest_alpha"] == pytest.approx(1 / 5001)


@pytest.mark.parametrize("field", ["image", "images", "file", "files"])
async def test_classify_takes_files(http: httpx.AsyncClient, worker: Worker, field: str) -> None:
    files = [(field, ("a.png", BOOT)), (field, ("b.png", png(Image.new("L", (28, 28), 3))))]
    response = await http.post("/classify", files=files, data={"top_k": "1"}, params={"method": "single"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [len(result["top_k"]) for result in answer["results"]] == [1, 1]
    assert answer["receipt"]["method"] == "single"
    assert [image[0] for image in worker.seen[0].work.images] == [77, 3]


async def test_models_are_listed_as_advertised(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/models")).json()["models"]
    assert [model["name"] for model in listed] == ["drawer", "judge"]
    one = (await http.get("/models/drawer")).json()
    assert one == listed[0]
    assert one["gears"][1]["schedule"] == {"edges": [0.5, 1.0], "depths": [4, 2], "weights": ""}
    missing = await http.get("/models/nobody")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


async def test_health_and_docs(http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).json() == {"status": "ready", "models": {"drawer": 1, "judge": 1}}
    assert (await http.get("/docs")).status_code == 200
    page = await http.get("/openapi.json")
    assert "$defs" not in page.text
    paths = page.json()["paths"]
    bodies = paths["/classify"]["post"]["requestBody"]["content"]
    assert bodies.keys() == {"application/json", "multipart/form-data"}
    fields = paths["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["n"]["maximum"] == 64
    assert "churn" in fields["solver_options"]["anyOf"][0]["properties"]


async def test_metrics_count_requests_and_read_the_queue(http: httpx.AsyncClient) -> None:
    await http.post("/generate", json={"n": 2})
    await http.post("/generate", json={"label": 99})
    await http.post("/classify", json={"image": b64(BOOT), "model": "made-up"})
    lines = (await http.get("/metrics")).text.splitlines()
    for line in (
        'offramp_requests_total{model="drawer",outcome="ok",task="generate"} 1.0',
        'offramp_requests_total{model="drawer",outcome="bad_request",task="generate"} 1.0',
        'offramp_requests_total{model="other",outcome="bad_request",task="classify"} 1.0',
        'offramp_requests_total{model="judge",outcome="ok",task="classify"} 0.0',
        'offramp_request_duration_seconds_count{model="drawer",task="generate"} 2.0',
        'offramp_requests_waiting{task="generate"} 0.0',
        'offramp_queue_jobs{model="drawer"} 0.0',
        'offramp_queue_cost{model="drawer"} 0.0',
        'offramp_workers{model="drawer"} 1.0',
        'offramp_ledger_jobs{model="drawer",state="accepted"} 1.0',
        'offramp_ledger_jobs{model="drawer",state="ok"} 1.0',
    ):
        assert line in lines
    assert "made-up" not in "\n".join(lines)
