from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from service.gateway import following
from service.protocol import encode
from tests.service.gateway.serving import Held, Worker, client, gateway

ASYNC = {"Prefer": "respond-async"}
Heard = tuple[str, str, Any]


async def listen(http: httpx.AsyncClient, job_id: str, headers: dict[str, str] | None = None, **query: str) -> Any:
    """(id, event, data) of each event until the stream ends; comments are left out."""
    async with http.stream("GET", f"/jobs/{job_id}/events", headers=headers, params=query) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-store", "no")
        async for event in heard(answer):
            yield event


async def heard(answer: httpx.Response) -> AsyncIterator[Heard]:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
            fields = {}


async def asked(http: httpx.AsyncClient, **body: Any) -> str:
    return str((await http.post("/generate", json=body, headers=ASYNC)).json()["id"])


async def test_a_job_tells_its_story(held: Held, held_http: httpx.AsyncClient) -> None:
    job_id = await asked(held_http)
    story = listen(held_http, job_id)
    assert (await anext(story))[1:] == ("queued", {})
    assert (await anext(story))[1:] == ("started", {})
    delivery = await held.taken.get()
    told = {"progress": encode({"done": 2, "of": 5}), "preview": encode({0: b"\x89PNG..."})}
    assert await held.broker.checkpoint("drawer", delivery, {}, 2, 5, 60, **told)
    assert (await anext(story))[1:] == ("progress", {"done": 2, "of": 5})
    _, name, data = await anext(story)
    assert (name, {index: b64decode(picture) for index, picture in data.items()}) == ("preview", {"0": b"\x89PNG..."})
    await held.finish(delivery)
    rest = [event async for event in story]
    assert [event[1:] for event in rest] == [("completed", {"status": "succeeded"})]


async def test_of_previews_the_newest_is_told(held: Held, held_http: httpx.AsyncClient) -> None:
    job_id = await asked(held_http)
    delivery = await held.taken.get()
    for i in range(3):
        told = {"progress": encode({"done": i, "of": 5}), "preview": encode({0: bytes([i])})}
        await held.broker.checkpoint("drawer", delivery, {}, i, 5, 60, **told)
    story = listen(held_http, job_id)
    heard = [(await anext(story))[1:] for _ in range(6)]
    assert [name for name, _ in heard] == ["queued", "started", "progress", "progress", "progress", "preview"]
    assert heard[-1] == ("preview", {"0": b64encode(bytes([2])).decode()})
    await held.finish(delivery)
    assert [name async for _, name, _ in story] == ["completed"]
    whole = [name async for _, name, _ in listen(held_http, job_id)]
    assert whole == ["queued", "started", "progress", "progress", "progress", "completed"]


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_follower_goes_on_where_it_stopped(worker: Worker, http: httpx.AsyncClient, by_header: bool) -> None:
    job_id = await asked(http)
    whole = [event async for event in listen(http, job_id)]
    assert [name for _, name, _ in whole] == ["queued", "started", "completed"]
    assert len({number for number, _, _ in whole}) == 3
    for place, (number, _, _) in enumerate(whole):
        where = {"headers": {"Last-Event-ID": number}} if by_header else {"after": number}
        rest = [event async for event in listen(http, job_id, **where)]  # type: ignore[arg-type]
        if place < 2:
            assert rest == whole[place + 1 :]
        else:  # who has heard of the end already is told again rather than left waiting
            assert [event[1:] for event in rest] == [("completed", {"status": "succeeded"})]


async def test_a_cancelled_job_tells_so(held: Held, held_http: httpx.AsyncClient) -> None:
    job_id = await asked(held_http)
    story = listen(held_http, job_id)
    assert (await anext(story))[1] == "queued"
    await held_http.delete(f"/jobs/{job_id}")
    assert [event async for event in story][-1][1:] == ("completed", {"status": "cancelled"})


async def test_a_synchronous_job_is_told_of_from_its_status(
    held: Held, held_http: httpx.AsyncClient, redis: Redis
) -> None:
    waiting = asyncio.create_task(held_http.post("/generate", json={}))
    delivery = await held.taken.get()
    story = listen(held_http, delivery.job.id)
    assert [await anext(story), await anext(story)] == [("", "queued", {}), ("", "started", {})]
    await held.broker.checkpoint("drawer", delivery, {}, 3, 5, 60)
    assert await anext(story) == ("", "progress", {"done": 3, "of": 5})
    await held.finish(delivery)
    assert [event async for event in story] == [("", "completed", {"status": "succeeded"})]
    assert (await waiting).status_code == 200


async def test_a_story_whose_stream_is_gone_ends(worker: Worker, http: httpx.AsyncClient, redis: Redis) -> None:
    job_id = await asked(http)
    await http.get(f"/jobs/{job_id}", params={"wait": 20})
    assert await redis.delete(f"offramp:{{m:drawer}}:ev:{job_id}") == 1
    assert [event[1:] async for event in listen(http, job_id)][-1] == ("completed", {"status": "succeeded"})
    assert [event[1:] async for event in listen(http, job_id, after="5-1")][-1] == (
        "completed",
        {"status": "succeeded"},
    )


@pytest.mark.parametrize("place", ["$", "-", "1-2-3", "9" * 30, "x"])
async def test_a_place_that_is_none_is_refused(http: httpx.AsyncClient, place: str) -> None:
    job_id = await asked(http)
    for where in ({"params": {"after": place}}, {"headers": {"Last-Event-ID": place}}):
        answer = await http.get(f"/jobs/{job_id}/events", **where)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["code"]) == (422, "bad_request")


async def test_a_silent_stream_pings(held: Held, held_http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PING_S", 0.1)
    job_id = await asked(held_http)
    async with held_http.stream("GET", f"/jobs/{job_id}/events") as answer:
        lines = answer.aiter_lines()
        while await anext(lines) != ": ping":
            pass


async def test_a_hundred_followers_leave_room_for_everybody_else(held: Held, valkey_url: str) -> None:
    """More followers than the broker has connections, on one job and on many; submits and answers go on meanwhile."""
    limits = httpx.Limits(max_connections=None)
    with gateway(valkey_url) as base:
        async with httpx.AsyncClient(base_url=base, timeout=60, trust_env=False, limits=limits) as http:
            jobs = [await asked(http, seed=i) for i in range(10)]

            async def heard_of(job_id: str) -> list[str]:
                return [name async for _, name, _ in listen(http, job_id)]

            followers = [asyncio.create_task(heard_of(job_id)) for job_id in jobs for _ in range(10)]
            deliveries = [await held.taken.get() for _ in jobs]
            for seed in range(20):
                sync = asyncio.create_task(http.post("/generate", json={"seed": seed}))
                await held.finish(await held.taken.get())
                assert (await sync).json()["images"][0]["seed"] == seed
            assert not any(follower.done() for follower in followers)
            for delivery in deliveries:
                await held.finish(delivery)
            assert await asyncio.gather(*followers) == [["queued", "started", "completed"]] * 100


async def test_followers_do_not_hold_up_the_end_of_a_gateway(held: Held, valkey_url: str) -> None:
    """Its stream ends whole, without `completed`; the client goes on at another gateway where it stopped."""
    async with client(valkey_url) as other:
        leaving = ExitStack()
        base = leaving.enter_context(gateway(valkey_url))
        async with httpx.AsyncClient(base_url=base, timeout=30, trust_env=False) as http:
            job_id = await asked(http)
            await held.taken.get()
            story = listen(http, job_id)
            told = [await anext(story), await anext(story)]
            stopped = asyncio.create_task(asyncio.to_thread(leaving.close))
            assert [event async for event in story] == []
            await stopped
        await other.delete(f"/jobs/{job_id}")
        rest = [name async for _, name, _ in listen(other, job_id, {"Last-Event-ID": told[-1][0]})]
        assert rest == ["completed"]


async def test_a_follower_that_hung_up_costs_nothing(
    held: Held, held_http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for_news, news = 0, following.Story.news

    async def counted(story: following.Story) -> list[str]:
        nonlocal asked_for_news
        asked_for_news += 1
        return await news(story)

    monkeypatch.setattr(following.Story, "news", counted)
    monkeypatch.setattr(following, "PAUSE_S", (0.02, 0.02))
    job_id = await asked(held_http)
    async with held_http.stream("GET", f"/jobs/{job_id}/events") as answer:
        assert await anext(heard(answer))
    for _ in range(50):
        before = asked_for_news
        await asyncio.sleep(0.3)
        if asked_for_news == before:
            return
    raise AssertionError("it is still being told")
