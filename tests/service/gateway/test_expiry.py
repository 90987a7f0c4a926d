"""Jobs and webhooks of models that no worker serves any more: gateways end them and tell of it."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.gateway import expiry
from tests.service.gateway.receiver import Receiver
from tests.service.gateway.serving import Worker, client, silent
from tests.service.gateway.test_jobs_events import listen
from tests.service.gateway.test_webhooks import OPEN, until, verified

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
async def deserted(redis: Redis, valkey_url: str) -> None:
    """Models whose last worker takes nothing any more."""
    async with Worker(valkey_url, silent):
        pass


async def gone(redis: Redis) -> None:
    """The last sign of life of any worker expires."""
    assert await redis.delete(keys.workers("drawer"), keys.workers("judge")) == 2


async def test_without_a_worker_followers_hear_the_end(
    deserted: None, redis: Redis, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "GRACE_MS", 0)
    async with client(valkey_url) as http:
        job_id = (await http.post("/generate", json={"deadline_ms": 300}, headers=ASYNC)).json()["id"]
        await gone(redis)
        assert [event[1:] async for event in listen(http, job_id)] == [
            ("queued", {}),
            ("completed", {"status": "expired"}),
        ]
        view = (await http.get(f"/jobs/{job_id}")).json()
        assert (view["status"], view["error"]["code"]) == ("expired", "deadline_exceeded")


async def test_without_a_worker_webhooks_are_told(
    deserted: None, redis: Redis, valkey_url: str, receiver: Receiver
) -> None:
    async with client(valkey_url, **OPEN) as http:
        body = {"webhook": receiver.url}
        job_id = (await http.post("/generate", json=body, headers=ASYNC)).json()["id"]
        await gone(redis)
        end = time.monotonic() + 20
        while (await http.get("/models")).json()["models"]:
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        await http.delete(f"/jobs/{job_id}")
        assert verified((await until(lambda: receiver.got))[0])["data"]["id"] == job_id
