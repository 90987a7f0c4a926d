from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image
from redis.asyncio import Redis

from service.broker import keys
from service.broker.redis_streams import Broker
from service.config import Settings
from service.gateway.app import create_app
from service.gateway.middleware import Direct
from service.gateway.routes import classify, generate
from service.protocol import Delivery, Failure, Result
from tests.service.gateway.serving import Worker, b64, client, echo, expired, failing, png, silent
from tests.service.gateway.test_gateway_imaging import png_bomb

BOOT = b64(png(Image.new("L", (28, 28), 77)))


def problem(response: httpx.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """The body, after checking that it is RFC 9457 and says what is expected."""
    body: dict[str, Any] = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert (response.status_code, body["code"], body.get("field")) == (status, code, field), body
    assert body["status"] == status
    assert body["instance"] == response.request.url.path
    assert body["request_id"] == response.headers["X-Request-Id"]
    assert body["type"] == f"/docs#{code}"
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize(
    ("body", "code", "field", "said"),
    [
        ({"model": "nobody"}, "unknown_name", "model", "known: drawer"),
        ({"model": "judge"}, "unknown_name", "model", "known: drawer"),
        ({"label": "Sandal"}, "unknown_name", "label", "known: T-shirt/top, Trouser, Boot"),
        ({"label": 3}, "unknown_name", "label", "not below 3"),
        ({"gear": "warp"}, "unknown_name", "gear", "known: auto, full, eco"),
        ({"n": 0}, "bad_request", "n", "greater than or equal to 1"),
        ({"n": 65}, "bad_request", "n", "less than or equal to 64"),
        ({"n": "2"}, "bad_request", "n", "integer"),
        ({"guidance": float("nan")}, "bad_request", "guidance", "finite"),
        ({"guidance": float("inf")}, "bad_request", "guidance", "finite"),
        ({"solver": "magic"}, "bad_request", "solver", "ddim"),
        ({"prompt": "boots"}, "bad_request", "prompt", "not permitted"),
        ([], "bad_request", None, "dictionary"),
    ],
)
async def test_generate_names_what_is_wrong(
    http: httpx.AsyncClient, body: object, code: str, field: str | None, said: str
) -> None:
    response = await http.post("/generate", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert said in problem(response, 422, code, field)["detail"]


async def test_every_wrong_field_is_listed(http: httpx.AsyncClient) -> None:
    body = problem(await http.post("/generate", json={"n": 0, "steps": -1, "label": []}), 422, "bad_request", "label")
    assert {error["field"] for error in body["errors"]} == {"n", "steps", "label"}


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[" * 50_000, b'{"n": ' + b"9" * 5000 + b"}"], ids=["cut", "binary", "deep", "long"]
)
async def test_what_is_no_json_is_refused(http: httpx.AsyncClient, content: bytes) -> None:
    problem(
        await http.post("/generate", content=content, headers={"Content-Type": "application/json"}), 422, "bad_request"
    )


async def test_form_bodies_and_query_parameters_are_refused(http: httpx.AsyncClient) -> None:
    problem(await http.post("/generate", data={"n": "2"}), 422, "bad_request", "Content-Type")
    problem(await http.post("/generate?seed=3", json={}), 422, "bad_request", "seed")


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({}, 422, "bad_request", "image"),
        ({"image": BOOT, "images": [BOOT]}, 422, "bad_request", "image"),
        ({"images": []}, 422, "bad_request", "images"),
        ({"images": [BOOT] * 65}, 422, "bad_request", "images"),
        ({"images": [BOOT, 3]}, 422, "bad_request", "images.1"),
        ({"image": "%%"}, 422, "not_an_image", "image"),
        ({"images": [BOOT, b64(b"hello")]}, 422, "not_an_image", "images.1"),
        ({"image": b64(png_bomb(50_000, 50_000))}, 413, "too_large", "image"),
        ({"image": b64(png_bomb(1001, 1000))}, 413, "too_large", "image"),
        ({"image": BOOT, "method": "ensemble"}, 422, "unknown_name", "method"),
        ({"image": BOOT, "method": "oracle"}, 422, "bad_request", "method"),
        ({"image": BOOT, "model": "drawer"}, 422, "unknown_name", "model"),
        ({"image": BOOT, "top_k": 0}, 422, "bad_request", "top_k"),
        ({"image": BOOT, "url": "x"}, 422, "bad_request", "url"),
        *[({"image": BOOT, "alpha": a}, 422, "bad_request", "alpha") for a in (0, 1, -0.1, 1.5, "0.1", True)],
        ({"image": BOOT, "alpha": 0.1, "method": "single"}, 422, "bad_request", "alpha"),
        *[({"image": BOOT, "max_cost": c}, 422, "bad_request", "max_cost") for c in (0, 0.99, 1.18, -1, "2", [2])],
        ({"image": BOOT, "max_cost": 2, "method": "bridge"}, 422, "bad_request", "max_cost"),
        *[({"image": BOOT, "purify": d}, 422, "bad_request", "purify") for d in (0, 17, -1, 1.5, "4", True, [4])],
        ({"image": BOOT, "purify": 4, "method": "cascade"}, 422, "bad_request", "purify"),
        ({"image": BOOT, "purify": 4, "max_cost": 2}, 422, "bad_request", "purify"),
        ({"image": BOOT, "purify": 4, "alpha": 0.1}, 422, "bad_request", "alpha"),
    ],
)
async def test_classify_names_what_is_wrong(
    http: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, field: str
) -> None:
    problem(await http.post("/classify", json=body), status, code, field)


@pytest.mark.parametrize("field", ["alpha", "max_cost"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_json_does_not_have_are_refused(http: httpx.AsyncClient, field: str, value: str) -> None:
    content, headers = f'{{"image": "{BOOT}", "{field}": {value}}}', {"Content-Type": "application/json"}
    problem(await http.post("/classify", content=content, headers=headers), 422, "bad_request", field)


@pytest.mark.parametrize(
    ("files", "data", "field", "code"),
    [
        ([("file", b"x")], {}, "file", "not_an_image"),
        ([("picture", b"x")], {}, "picture", "bad_request"),
        ([("file", b"x")] * 65, {}, "files", "bad_request"),
        ([("file", b"x")], {"top_k": "many"}, "top_k", "bad_request"),
        ([("file", b"x")], {"colour": "red"}, "colour", "bad_request"),
        *[([("file", b"x")], {"max_cost": c}, "max_cost", "bad_request") for c in ("nan", "inf", "0", "cheap")],
        *[([("file", b"x")], {"alpha": a}, "alpha", "bad_request") for a in ("nan", "inf", "0", "1.0", "")],
        *[([("file", b"x")], {"purify": d}, "purify", "bad_request") for d in ("0", "17", "yes", "1.5", "")],
        ([("file", b"x")], {"image": "text"}, "image", "bad_request"),
        ([("file", b"x")], {"top_k": ["1", "2"]}, "top_k", "bad_request"),
    ],
)
async def test_multipart_names_what_is_wrong(
    http: httpx.AsyncClient, files: list[tuple[str, bytes]], data: dict[str, Any], field: str, code: str
) -> None:
    problem(await http.post("/classify", files=files, data=data), 422, code, field)


async def test_broken_multipart_is_refused(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    problem(await http.post("/classify", content=b"no boundary", headers=headers), 422, "bad_request")


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b" " * 10_000


async def test_a_body_over_the_limit_is_refused_with_or_without_its_length(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    problem(await http.post("/generate", content=b" " * 100_001, headers=headers), 413, "too_large")
    problem(await http.post("/generate", content=chunks(11), headers=headers), 413, "too_large")
    problem(await http.post("/classify", files={"file": b" " * 100_001}), 413, "too_large")
    exact = json.dumps({"seed": 1}).encode().ljust(100_000)
    assert (await http.post("/generate", content=exact, headers=headers)).status_code == 200


def test_routes_that_are_answered_directly_are_the_ones_that_are_documented() -> None:
    app = create_app(Settings(redis_url="redis://127.0.0.1:1"))
    [direct] = [middleware.kwargs["handlers"] for middleware in app.user_middleware if middleware.cls is Direct]
    routes = [route for module in (generate, classify) for route in module.router.routes]
    assert {route.path: route.endpoint for route in routes} == direct
    assert all(route.methods == {"POST"} and not route.dependencies for route in routes)


async def test_unacceptable_unknown_page_and_wrong_verb(http: httpx.AsyncClient) -> None:
    problem(await http.post("/generate", json={}, headers={"Accept": "text/html"}), 406, "not_acceptable", "Accept")
    problem(
        await http.post("/classify", json={"image": BOOT}, headers={"Accept": "image/png"}),
        406,
        "not_acceptable",
        "Accept",
    )
    problem(await http.get("/nowhere"), 404, "not_found")
    verb = await http.get("/generate")
    problem(verb, 405, "not_allowed")
    assert verb.headers["Allow"] == "POST"


async def test_a_strange_request_id_is_replaced(http: httpx.AsyncClient) -> None:
    response = await http.get("/healthz", headers={"X-Request-Id": "a b" + "c" * 200})
    assert len(response.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize(
    ("code", "status", "shown"),
    [("job_failed", 500, "job_failed"), ("too_large", 413, "too_large"), ("from_the_future", 500, "job_failed")],
)
async def test_a_workers_failure_comes_back_by_its_code(
    redis: Redis, valkey_url: str, code: str, status: int, shown: str
) -> None:
    async with Worker(valkey_url, failing(code)), client(valkey_url) as http:
        assert problem(await http.post("/generate", json={}), status, shown)["detail"] == "it broke"


async def test_what_a_worker_refuses_names_the_field(redis: Redis, valkey_url: str) -> None:
    def refuse(delivery: Delivery) -> Result:
        failure = Failure("bad_request", "ddpm has no eta", field="solver_options.eta")
        return Result(id=delivery.job.id, outcome="failed", failure=failure)

    async with Worker(valkey_url, refuse), client(valkey_url) as http:
        response = await http.post("/generate", json={"solver": "ddpm", "solver_options": {"eta": 0.3}})
        problem(response, 422, "bad_request", "solver_options.eta")


@pytest.mark.parametrize("answer", [silent, expired])
async def test_a_passed_deadline_is_504(redis: Redis, valkey_url: str, answer: Any) -> None:
    async with Worker(valkey_url, answer), client(valkey_url) as http:
        problem(await http.post("/generate", json={"deadline_ms": 50}), 504, "deadline_exceeded", "deadline_ms")
        lines = (await http.get("/metrics")).text.splitlines()
        assert await refusals(http) == {}  # it was queued
    assert 'offramp_requests_total{model="drawer",outcome="expired",task="generate"} 1.0' in lines


async def refusals(http: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """Refused requests by model and reason."""
    text = (await http.get("/metrics")).text
    found = re.findall(r'^offramp_refusals_total{model="(.+)",reason="(.+)"} (.+)$', text, re.M)
    return {(model, reason): float(count) for model, reason, count in found if float(count)}


async def test_a_full_queue_is_429_with_retry_after(redis: Redis, valkey_url: str) -> None:
    taken = asyncio.Event()
    held: list[Delivery] = []

    def hold_the_first(delivery: Delivery) -> Result | None:
        if held:
            return echo(delivery)
        held.append(delivery)
        taken.set()
        return None

    broker = Broker(valkey_url)
    async with Worker(valkey_url, hold_the_first), client(valkey_url, max_backlog=30) as http:
        first = asyncio.create_task(http.post("/generate", json={}))
        await taken.wait()
        refused = await http.post("/generate", json={})
        body = problem(refused, 429, "queue_full")
        assert int(refused.headers["Retry-After"]) == body["retry_after_s"] >= 1
        assert await refusals(http) == {("drawer", "queue_full"): 1.0}
        result = echo(held[0])
        await broker.notify([await broker.finish("drawer", held[0], result, 60)])
        assert (await first).status_code == 200
        assert (await http.post("/generate", json={})).status_code == 200
    await broker.aclose()


async def test_no_worker_is_503(redis: Redis, valkey_url: str) -> None:
    async with client(valkey_url) as http:
        nothing = await http.post("/generate", json={"model": "drawer"})
        problem(nothing, 503, "no_worker")
        assert int(nothing.headers["Retry-After"]) >= 1
        problem(await http.get("/readyz"), 503, "no_worker")
        assert await refusals(http) == {("other", "no_worker"): 1.0}


async def test_an_advertised_model_without_a_live_worker_is_503(http: httpx.AsyncClient, redis: Redis) -> None:
    await redis.zadd(keys.workers("drawer"), dict.fromkeys(await redis.zrange(keys.workers("drawer"), 0, -1), 0))
    problem(await http.post("/generate", json={}), 503, "no_worker", "model")
    assert "drawer" in problem(await http.get("/readyz"), 503, "no_worker", "model")["detail"]
    assert (await http.post("/classify", json={"image": BOOT})).status_code == 200
