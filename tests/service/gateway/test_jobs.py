from __future__ import annotations

import asyncio
from base64 import b64decode
from contextlib import aclosing
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from redis.asyncio import Redis

from service.broker.letters import new_id
from service.broker.redis_streams import Broker
from service.gateway import following
from service.keys import digest, new_key
from service.protocol import Terms
from tests.service.broker.jobs import job
from tests.service.gateway.serving import Held, Worker, b64, client, expired, failing, gateway, png, silent

ASYNC = {"Prefer": "respond-async"}
BOOT = png(Image.new("L", (28, 28), 77))


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    answer = await http.get(f"/jobs/{job_id}", params={"wait": 20})
    assert answer.status_code == 200, answer.text
    view: dict[str, Any] = answer.json()
    assert view["status"] not in ("queued", "running")
    return view


async def test_a_job_is_accepted_watched_and_fetched(held: Held, held_http: httpx.AsyncClient) -> None:
    answer = await held_http.post("/generate", json={"seed": 9, "deadline_ms": 60_000}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    view = answer.json()
    assert answer.headers["Location"] == f"/jobs/{view['id']}"
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert (view["model"], view["status"] in ("queued", "running")) == ("drawer", True)
    assert 59_000 < view["deadline_ms"] <= 60_000
    assert abs((datetime.now(UTC) - datetime.fromisoformat(view["created"])).total_seconds()) < 60

    delivery = await held.taken.get()
    assert await held.broker.checkpoint("drawer", delivery, {}, 2, 5, 60)
    running = (await held_http.get(f"/jobs/{view['id']}")).json()
    assert (running["status"], running["progress"]) == ("running", {"done": 2, "of": 5})
    unfinished = await held_http.get(f"/jobs/{view['id']}/result")
    assert (unfinished.status_code, unfinished.json()["status"]) == (202, "running")

    await held.finish(delivery)
    done = await ended(held_http, view["id"])
    assert (done["status"], done["result"]["id"], done["result"]["images"][0]["seed"]) == ("succeeded", view["id"], 9)
    assert "progress" not in done
    assert done["result"]["timings"] == {"queue_s": 0.25, "run_s": 0.5, "total_s": 0.75}
    result = await held_http.get(f"/jobs/{view['id']}/result")
    assert (result.status_code, result.json()) == (200, done["result"])


async def test_an_answer_within_wait_is_an_ordinary_one(http: httpx.AsyncClient) -> None:
    answer = await http.post("/generate", json={"seed": 3}, headers={"Prefer": "respond-async, wait=30"})
    assert (answer.status_code, answer.json()["images"][0]["seed"]) == (200, 3)
    assert "Location" not in answer.headers


async def test_after_wait_the_job_goes_on(held: Held, held_http: httpx.AsyncClient) -> None:
    answer = await held_http.post("/generate", json={}, headers={"Prefer": "respond-async, wait=0.2"})
    assert answer.status_code == 202
    await held.finish(await held.taken.get())
    assert (await ended(held_http, answer.json()["id"]))["status"] == "succeeded"


async def test_any_gateway_answers_as_the_synchronous_call_would(worker: Worker, valkey_url: str) -> None:
    body = {"images": [b64(BOOT)] * 2, "top_k": 2, "method": "bridge", "alpha": 0.1}
    async with client(valkey_url) as one, client(valkey_url) as other:
        now = (await one.post("/classify", json=body)).json()
        later = (await one.post("/classify", json=body, headers=ASYNC)).json()
        view = await ended(other, later["id"])
    assert view["result"]["results"] == now["results"]
    assert [len(result["top_k"]) for result in view["result"]["results"]] == [2, 2]
    assert view["result"]["receipt"] == now["receipt"]


@pytest.mark.parametrize("encoding", ["png", "webp", "npy"])
@pytest.mark.parametrize("n", [1, 3])
async def test_the_picture_of_a_job_whatever_it_was_encoded_as(http: httpx.AsyncClient, encoding: str, n: int) -> None:
    body = {"seed": 200, "n": n, "format": encoding}
    job_id = (await http.post("/generate", json=body, headers=ASYNC)).json()["id"]
    await ended(http, job_id)
    for kind in ("png", "webp"):
        answer = await http.get(f"/jobs/{job_id}/result", headers={"Accept": f"image/{kind}"})
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, f"image/{kind}")
        picture = Image.open(BytesIO(answer.content))
        assert (picture.format, picture.size[0]) == (kind.upper(), 28 if n == 1 else 56)
        assert np.asarray(picture.convert("L"))[0, 0] == 200
        assert (answer.headers["Offramp-Id"], answer.headers["Offramp-Seed"]) == (job_id, "200")


async def test_a_classification_is_no_picture(http: httpx.AsyncClient) -> None:
    job_id = (await http.post("/classify", json={"image": b64(BOOT)}, headers=ASYNC)).json()["id"]
    await ended(http, job_id)
    answer = await http.get(f"/jobs/{job_id}/result", headers={"Accept": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize(
    ("answer", "state", "status", "code"),
    [(failing("job_failed"), "failed", 500, "job_failed"), (expired, "expired", 504, "deadline_exceeded")],
)
async def test_what_went_wrong_is_the_synchronous_problem(
    redis: Redis, valkey_url: str, answer: Any, state: str, status: int, code: str
) -> None:
    async with Worker(valkey_url, answer), client(valkey_url) as http:
        view = await ended(http, (await http.post("/generate", json={}, headers=ASYNC)).json()["id"])
        assert (view["status"], view["error"]["status"], view["error"]["code"]) == (state, status, code)
        assert view["error"]["instance"] == f"/jobs/{view['id']}"
        result = await http.get(f"/jobs/{view['id']}/result")
        assert (result.status_code, result.json()["code"]) == (status, code)


async def test_a_job_given_up_shows_as_failed(redis: Redis, valkey_url: str) -> None:
    async with aclosing(Broker(valkey_url)) as broker, client(valkey_url) as http:
        lost = replace(job("judge"), id=new_id("judge"))
        await broker.ensure("judge")
        await broker.submit(lost, Terms(rows=1, deadline_ms=60_000, max_backlog=1000))
        for _ in range(2):
            await broker.take("judge", "w", 64, 64, 0, max_deliveries=1)
            await asyncio.sleep(0.01)
        view = (await http.get(f"/jobs/{lost.id}")).json()
    assert (view["status"], view["error"]["code"]) == ("failed", "job_failed")


async def test_a_queued_job_knows_its_place(redis: Redis, valkey_url: str) -> None:
    async with Worker(valkey_url, silent):
        pass  # it advertised the models and takes nothing any more
    async with client(valkey_url) as http:
        ids = [(await http.post("/generate", json={}, headers=ASYNC)).json()["id"] for _ in range(3)]
        views = [(await http.get(f"/jobs/{job_id}")).json() for job_id in ids]
    assert [view["position"] for view in views] == [0, 1, 2]


async def test_a_poll_is_not_answered_for_a_place_in_the_queue(redis: Redis, valkey_url: str) -> None:
    async with Worker(valkey_url, silent):
        pass
    async with client(valkey_url) as http:
        ids = [(await http.post("/generate", json={}, headers=ASYNC)).json()["id"] for _ in range(2)]
        first = await http.get(f"/jobs/{ids[1]}")
        known = {"If-None-Match": first.headers["ETag"]}
        waiting = asyncio.create_task(http.get(f"/jobs/{ids[1]}", headers=known, params={"wait": 2}))
        await asyncio.sleep(0.2)
        await http.delete(f"/jobs/{ids[0]}")
        await asyncio.sleep(0.8)
        assert not waiting.done()
        assert (await waiting).status_code == 304
        last = await http.get(f"/jobs/{ids[1]}/result", params={"wait": 0.1})
        assert (last.status_code, last.json()["position"]) == (202, 0)


async def test_waiting_requests_of_a_key_are_limited(
    held: Held, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "MOST", 2)
    mine, other = new_key(), new_key()
    known = f"mine:{digest(mine).hex()},other:{digest(other).hex()}"
    with gateway(valkey_url, api_keys=known) as base:
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=30) as http:
            me, you = {"X-API-Key": mine}, {"X-API-Key": other}
            url = "/jobs/" + (await http.post("/generate", json={}, headers=ASYNC | me)).json()["id"]
            yours = "/jobs/" + (await http.post("/generate", json={}, headers=ASYNC | you)).json()["id"]
            async with http.stream("GET", f"{url}/events", headers=me) as story:
                lines = story.aiter_lines()  # kept: without it the stream is closed
                await anext(lines)
                poll = asyncio.create_task(http.get(f"{url}/result", params={"wait": 20}, headers=me))
                await asyncio.sleep(0.3)
                for last in ("/events", "?wait=1", "/result?wait=1"):
                    refused = await http.get(url + last, headers=me)
                    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
                    assert int(refused.headers["Retry-After"]) > 0
                assert (await http.get(url, headers=me)).status_code == 200
                assert (await http.get(f"{yours}?wait=0.1", headers=you)).status_code == 200
                await held.finish(await held.taken.get())
                assert (await poll).status_code == 200
            assert (await http.get(f"{url}/events", headers=me)).status_code == 200
            assert (await http.get(f"{url}/events", headers=me)).status_code == 200


async def test_a_tag_spares_the_body_and_a_poll_waits_for_news(held: Held, held_http: httpx.AsyncClient) -> None:
    job_id = (await held_http.post("/generate", json={}, headers=ASYNC)).json()["id"]
    delivery = await held.taken.get()
    first = await held_http.get(f"/jobs/{job_id}")
    known = {"If-None-Match": first.headers["ETag"]}
    same = await held_http.get(f"/jobs/{job_id}", headers=known)
    assert (same.status_code, same.content) == (304, b"")
    news = asyncio.create_task(held_http.get(f"/jobs/{job_id}", headers=known, params={"wait": 30}))
    await asyncio.sleep(0.2)
    assert not news.done()
    await held.broker.checkpoint("drawer", delivery, {}, 1, 5, 60)
    assert (await news).json()["progress"] == {"done": 1, "of": 5}
    assert (await held_http.get(f"/jobs/{job_id}", headers=known)).status_code == 200


async def test_cancelling_ends_a_running_job_at_once(held: Held, held_http: httpx.AsyncClient) -> None:
    job_id = (await held_http.post("/generate", json={}, headers=ASYNC)).json()["id"]
    delivery = await held.taken.get()
    for _ in range(2):  # cancelling is idempotent
        answer = await held_http.delete(f"/jobs/{job_id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert answer.json()["error"]["code"] == "cancelled"
    assert not await held.finish(delivery)
    assert (await held_http.get(f"/jobs/{job_id}")).json()["status"] == "cancelled"
    result = await held_http.get(f"/jobs/{job_id}/result")
    assert (result.status_code, result.json()["code"]) == (409, "cancelled")


async def test_whoever_waits_for_a_cancelled_job_is_told(held: Held, held_http: httpx.AsyncClient) -> None:
    waiting = asyncio.create_task(held_http.post("/generate", json={}))
    job_id = (await held.taken.get()).job.id
    await held_http.delete(f"/jobs/{job_id}")
    answer = await waiting
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")


async def test_what_is_over_cannot_be_cancelled(http: httpx.AsyncClient) -> None:
    job_id = (await http.post("/generate", json={})).json()["id"]
    answer = await http.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_over")
    assert (await http.get(f"/jobs/{job_id}")).json()["status"] == "succeeded"


@pytest.mark.parametrize(
    "job_id", ["x", f"drawer.{'0' * 32}", f"nobody.{'0' * 32}", f"drawer}}:x.{'0' * 32}", f"drawer.{'0' * 31}\n"]
)
async def test_unknown_jobs_are_not_found(http: httpx.AsyncClient, job_id: str) -> None:
    path = f"/jobs/{job_id.replace('}', '%7D').replace(chr(10), '%0A')}"
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/result"), ("GET", "/events")):
        answer = await http.request(method, path + tail)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, tail)


async def test_another_key_finds_no_job(http: httpx.AsyncClient, valkey_url: str) -> None:
    job_id = (await http.post("/generate", json={})).json()["id"]
    key = new_key()
    with gateway(valkey_url, api_keys=f"somebody:{digest(key).hex()}") as base:
        async with httpx.AsyncClient(base_url=base, trust_env=False, headers={"X-API-Key": key}) as other:
            for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/result"), ("GET", "/events")):
                assert (await other.request(method, f"/jobs/{job_id}{tail}")).status_code == 404
            mine = (await other.post("/generate", json={})).json()["id"]
            assert (await other.get(f"/jobs/{mine}")).status_code == 200
    assert (await http.get(f"/jobs/{mine}")).status_code == 404


async def test_a_finished_job_outlives_its_workers_and_their_model(
    worker: Worker, http: httpx.AsyncClient, redis: Redis
) -> None:
    job_id = (await http.post("/generate", json={"seed": 1}, headers=ASYNC)).json()["id"]
    await ended(http, job_id)
    await redis.delete("offramp:{m:drawer}:workers")
    view = (await http.get(f"/jobs/{job_id}")).json()
    assert b64decode(view["result"]["images"][0]["b64"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "soon"])
async def test_a_wait_out_of_bounds_is_refused(http: httpx.AsyncClient, wait: str) -> None:
    answer = await http.get(f"/jobs/drawer.{'0' * 32}", params={"wait": wait})
    assert (answer.status_code, answer.json()["field"]) == (422, "wait")
