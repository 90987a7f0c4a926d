from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.broker.embedded import Embedded
from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import DeadlineExceeded
from service.gateway.app import create_app
from service.gateway.replies import Replies
from service.protocol import Delivery
from tests.service.gateway.serving import Worker, client, echo

NOWHERE = "unix:///nonexistent/offramp.sock"
PROGRAM = """
import sys
from service.config import Settings
from service.gateway.app import create_app
assert "/classify" in create_app(Settings(redis_url="redis://127.0.0.1:1")).openapi()["paths"]
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "onnxruntime", "safetensors"}))
"""


@pytest.fixture
async def cut_off() -> AsyncIterator[httpx.AsyncClient]:
    async with client(NOWHERE) as found:
        yield found


@pytest.mark.parametrize("path", ["/healthz", "/docs", "/openapi.json", "/metrics"])
async def test_without_redis_the_process_still_answers(cut_off: httpx.AsyncClient, path: str) -> None:
    assert (await cut_off.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/generate"), ("GET", "/readyz"), ("GET", "/models"), ("GET", "/models/drawer")]
)
async def test_without_redis_work_is_refused(cut_off: httpx.AsyncClient, method: str, path: str) -> None:
    response = await cut_off.request(method, path, json={} if method == "POST" else None)
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) >= 1


async def test_a_bug_is_answered_without_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(redis_url=NOWHERE))

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("a secret")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        response = await http.get("/bug")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "secret" not in response.text
    assert response.headers["X-Request-Id"] in caplog.text


def test_the_gateway_never_imports_torch() -> None:
    repo = Path(__file__).resolve().parents[3]
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=repo, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


async def test_a_lost_wake_up_costs_delay_and_no_answer(valkey_url: str) -> None:
    async with Worker(valkey_url, echo, notify=False), client(valkey_url) as http:
        assert (await http.post("/generate", json={"seed": 3})).json()["images"][0]["seed"] == 3


async def test_waiting_ends_at_the_budget_even_without_redis() -> None:
    broker = Broker(NOWHERE)
    async with Replies(broker, "gateway", poll_s=0.01) as replies:
        with replies.expect("job") as event, pytest.raises(DeadlineExceeded):
            await replies.result(event, "drawer", "job", 0.1)
    await broker.aclose()


async def test_a_waiting_request_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    taken: asyncio.Queue[Delivery] = asyncio.Queue()
    server = Embedded(tmp_path)
    server.start()
    broker = Broker(server.url)
    try:
        async with Worker(server.url, taken.put_nowait), client(server.url) as http:
            waiting = asyncio.create_task(http.post("/generate", json={"seed": 7}))
            delivery = await taken.get()
            server.stop()
            assert (await http.post("/generate", json={})).status_code == 503
            server.start()
            await broker.notify([await broker.finish("drawer", delivery, echo(delivery), 60)])
            answer = await waiting
            assert answer.json()["images"][0]["seed"] == 7
            assert (await http.get("/readyz")).status_code == 200
    finally:
        await broker.aclose()
        server.stop()


async def test_nobody_waits_for_a_job_that_the_store_has_lost(valkey_url: str) -> None:
    taken: asyncio.Queue[Delivery] = asyncio.Queue()
    async with Worker(valkey_url, taken.put_nowait), client(valkey_url) as http, Redis.from_url(valkey_url) as redis:
        waiting = asyncio.create_task(http.post("/generate", json={"seed": 7}))
        delivery = await taken.get()
        await redis.delete(keys.job("drawer", delivery.job.id), keys.queue("drawer"))
        answer = await waiting
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "send the request again" in answer.json()["detail"]
