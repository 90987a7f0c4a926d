"""Clients that hang up, and clients that come back: over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from PIL import Image
from redis.asyncio import Redis

from tests.service.gateway.serving import Held, Worker, b64, client, echo, png

KEYED = {"Idempotency-Key": "order-66"}
BOOT = png(Image.new("L", (28, 28), 77))


async def left(task: asyncio.Task[Any]) -> None:
    """Hang up."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def waiting(http: httpx.AsyncClient, task: str = "generate") -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith(f'offramp_requests_waiting{{task="{task}"}}')]
    return float(found[0].split()[-1])


async def settles(http: httpx.AsyncClient, expected: float) -> None:
    for _ in range(200):
        if await waiting(http) == expected:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{await waiting(http)} requests wait, not {expected}")


async def test_who_hangs_up_has_the_job_cancelled(held: Held, held_http: httpx.AsyncClient, redis: Redis) -> None:
    request = asyncio.create_task(held_http.post("/generate", json={}))
    delivery = await held.taken.get()
    await settles(held_http, 1)
    await left(request)
    view = (await held_http.get(f"/jobs/{delivery.job.id}", params={"wait": 20})).json()
    assert (view["status"], view["error"]["code"]) == ("cancelled", "cancelled")
    await settles(held_http, 0)
    assert await redis.hgetall("offramp:{m:drawer}:ledger") == {b"accepted": b"1", b"cancelled": b"1"}
    assert (await held.broker.queue_stats("drawer")).jobs == 0
    counted = 'offramp_requests_total{model="drawer",outcome="cancelled",task="generate"} 1.0'
    assert counted in (await held_http.get("/metrics")).text.splitlines()
    assert not await held.finish(delivery)  # fenced off
    (told,) = (await held.broker.controls("double", "0"))[0]
    assert told == ("drawer", delivery.entry)  # its worker was told to stop


@pytest.mark.parametrize("headers", [KEYED, {"Prefer": "respond-async, wait=30"}])
async def test_who_can_come_back_has_not(
    held: Held, held_http: httpx.AsyncClient, redis: Redis, headers: dict[str, str]
) -> None:
    request = asyncio.create_task(held_http.post("/generate", json={}, headers=headers))
    delivery = await held.taken.get()
    await left(request)
    await asyncio.sleep(0.3)
    assert (await held_http.get(f"/jobs/{delivery.job.id}")).json()["status"] == "running"
    assert await held.finish(delivery)
    await settles(held_http, 0)


async def test_a_retry_attaches_to_what_runs_already(
    held: Held, held_http: httpx.AsyncClient, valkey_url: str, redis: Redis
) -> None:
    """Through the same gateway and through another one, all at once; then once more when it is over."""
    request = asyncio.create_task(held_http.post("/generate", json={"n": 2}, headers=KEYED))
    delivery = await held.taken.get()
    await left(request)
    async with client(valkey_url) as other:
        retries = [
            asyncio.create_task(http.post("/generate", json={"n": 2}, headers=KEYED))
            for http in (held_http, held_http, other)
        ]
        await asyncio.sleep(0.3)
        assert held.taken.empty()
        await held.finish(delivery)
        answers = [(await retry).json() for retry in retries]
        answers.append((await other.post("/generate", json={"n": 2}, headers=KEYED)).json())
    for answer in answers:
        assert answer["id"] == delivery.job.id
        assert [image["seed"] for image in answer["images"]] == list(delivery.job.work.seeds)  # type: ignore[union-attr]
        assert answer["images"] == answers[0]["images"]
    assert held.taken.empty()
    assert await redis.hgetall("offramp:{m:drawer}:ledger") == {b"accepted": b"1", b"ok": b"1"}


async def test_a_key_stands_for_one_request(http: httpx.AsyncClient, worker: Worker) -> None:
    first = await http.post("/generate", json={"seed": 1}, headers=KEYED)
    other = await http.post("/generate", json={"seed": 2}, headers=KEYED)
    assert (other.status_code, other.json()["code"], other.json()["field"]) == (409, "key_reused", "Idempotency-Key")
    again = await http.post("/generate", json={"seed": 1}, headers=KEYED)
    assert {**again.json(), "timings": 0} == {**first.json(), "timings": 0}
    picture = await http.post("/generate", json={"seed": 1}, headers={**KEYED, "Accept": "image/webp"})
    assert (picture.status_code, picture.headers["Offramp-Id"]) == (200, first.json()["id"])
    assert len(worker.seen) == 1


async def test_json_and_multipart_of_the_same_content_are_the_same(http: httpx.AsyncClient, worker: Worker) -> None:
    body, files = {"image": b64(BOOT), "method": "bridge", "top_k": 2}, [("file", ("a.png", BOOT))]
    first = await http.post("/classify", json=body, headers=KEYED)
    for form in ({"data": {"method": "bridge", "top_k": "2"}}, {"params": {"method": "bridge", "top_k": "2"}}):
        again = await http.post("/classify", files=files, headers=KEYED, **form)  # type: ignore[arg-type]
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        assert again.json()["results"] == first.json()["results"]
    other = await http.post("/classify", json=body | {"top_k": 1}, headers=KEYED)
    assert (other.status_code, other.json()["code"]) == (409, "key_reused")
    assert len(worker.seen) == 1


async def test_a_key_replays_failures_and_async_answers(redis: Redis, valkey_url: str) -> None:
    async with Worker(valkey_url, echo) as worker, client(valkey_url) as http:
        accepted = await http.post("/generate", json={}, headers={**KEYED, "Prefer": "respond-async"})
        job_id = accepted.json()["id"]
        await http.get(f"/jobs/{job_id}", params={"wait": 20})
        again = await http.post("/generate", json={}, headers={**KEYED, "Prefer": "respond-async, wait=20"})
        assert (again.status_code, again.json()["id"]) == (200, job_id)
        assert len(worker.seen) == 1


async def test_a_cancelled_job_stays_so_for_its_key(held: Held, held_http: httpx.AsyncClient) -> None:
    request = asyncio.create_task(held_http.post("/generate", json={}, headers=KEYED))
    await held_http.delete(f"/jobs/{(await held.taken.get()).job.id}")
    assert (await request).json()["code"] == "cancelled"
    again = await held_http.post("/generate", json={}, headers=KEYED)
    assert (again.status_code, again.json()["code"]) == (409, "cancelled")
