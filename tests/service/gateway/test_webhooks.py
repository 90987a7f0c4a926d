from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from service.broker.hooks import Hook
from service.broker.letters import new_id
from service.broker.redis_streams import Broker
from service.config import ConfigError, load_settings
from service.gateway import outbound, webhooks
from service.gateway.schemas import HookBody
from service.protocol import Terms
from tests.service.broker.jobs import job
from tests.service.gateway.receiver import Receiver
from tests.service.gateway.serving import Worker, client, expired, failing

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OPEN = {"webhook_secret": SECRET, "webhook_private": True}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "PAUSE_S", (0.01, 1.0, 0.01))


async def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while not (found := what()):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    return found


async def counted(http: httpx.AsyncClient, outcome: str) -> float:
    text = (await http.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(f'offramp_webhooks_total{{outcome="{outcome}"}}')]
    return float(line.split()[-1])


async def forgotten(redis: Redis, model: str = "drawer") -> None:
    end = time.monotonic() + 20
    while await redis.exists(f"offramp:{{m:{model}}}:hooks"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert not [key async for key in redis.scan_iter(f"offramp:{{m:{model}}}:hook:*")]


def verified(message: tuple[str, dict[str, str], bytes]) -> dict[str, Any]:
    """The body of a message whose signature is right (Standard Webhooks, as a receiver checks it)."""
    _, headers, body = message
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    said: dict[str, Any] = json.loads(body)
    HookBody.model_validate(said)
    return said


async def test_the_end_of_a_job_is_told_signed_and_small(
    worker: Worker, valkey_url: str, receiver: Receiver, redis: Redis
) -> None:
    async with client(valkey_url, **OPEN) as http:
        body = {"n": 64, "steps": 1000, "webhook": receiver.url}
        job_id = (await http.post("/generate", json=body, headers=ASYNC)).json()["id"]
        ((path, headers, raw),) = await until(lambda: receiver.got)
        said = verified((path, headers, raw))
        assert (path, headers["content-type"], headers["webhook-id"]) == ("/hook?x=1", "application/json", job_id)
        assert headers["host"] == f"127.0.0.1:{receiver.port}"
        assert (said["type"], said["data"]["id"], said["data"]["model"]) == ("job.succeeded", job_id, "drawer")
        assert (said["data"]["status"], said["data"]["receipt"]["steps"]) == ("succeeded", 1000)
        assert len(raw) < 5000
        assert (await http.get(f"/jobs/{said['data']['id']}/result")).status_code == 200
        await forgotten(redis)
        assert await counted(http, "delivered") == 1


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [(failing("job_failed"), "failed", "job_failed"), (expired, "expired", "deadline_exceeded")],
)
async def test_other_ends_are_told_too(
    redis: Redis, valkey_url: str, receiver: Receiver, answer: Any, kind: str, code: str
) -> None:
    async with Worker(valkey_url, answer), client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        said = verified((await until(lambda: receiver.got))[0])
    assert (said["type"], said["data"]["status"], said["data"]["error"]["code"]) == (f"job.{kind}", kind, code)


async def test_a_cancelled_job_is_told(redis: Redis, valkey_url: str, receiver: Receiver) -> None:
    async with Worker(valkey_url, lambda _: None), client(valkey_url, **OPEN) as http:
        job_id = (await http.post("/generate", json={"webhook": receiver.url}, headers=ASYNC)).json()["id"]
        await http.delete(f"/jobs/{job_id}")
        assert verified((await until(lambda: receiver.got))[0])["type"] == "job.cancelled"


async def test_it_tries_again_after_errors_and_follows_no_redirect(
    worker: Worker, valkey_url: str, receiver: Receiver, redis: Redis
) -> None:
    receiver.statuses, receiver.location = [500, 503, 302], "/elsewhere"
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        await until(lambda: len(receiver.got) == 4)
        await forgotten(redis)
        assert [path for path, _, _ in receiver.got] == ["/hook?x=1"] * 4
        assert len({verified(message)["data"]["id"] for message in receiver.got}) == 1
        assert len({headers["webhook-id"] for _, headers, _ in receiver.got}) == 1
        assert [await counted(http, outcome) for outcome in ("retried", "delivered", "given_up")] == [3, 1, 0]


@pytest.mark.parametrize(("statuses", "tries", "outcome"), [([410], 1, "gone"), ([500] * 3, 3, "given_up")])
async def test_it_stops_when_told_so_or_tired(
    worker: Worker, valkey_url: str, receiver: Receiver, redis: Redis, monkeypatch: pytest.MonkeyPatch,
    statuses: list[int], tries: int, outcome: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(webhooks, "TRIES", 3)
    receiver.statuses = list(statuses)
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        await until(lambda: len(receiver.got) == tries)
        await forgotten(redis)
        assert (len(receiver.got), await counted(http, outcome)) == (tries, 1)


async def test_nobody_listening_is_tried_again(
    worker: Worker, valkey_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        if host == "nobody.test":
            raise socket.gaierror("no such name")
        return ["127.0.0.1"]

    monkeypatch.setattr(webhooks, "TRIES", 2)
    monkeypatch.setattr(outbound, "_resolve", resolve)
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": "http://127.0.0.1:1/"})
        await http.post("/generate", json={"webhook": "http://nobody.test/"})
        await forgotten(redis)
        assert [await counted(http, outcome) for outcome in ("retried", "given_up")] == [2, 2]


async def test_a_lost_gateway_leaves_its_hook_to_another(worker: Worker, valkey_url: str, receiver: Receiver) -> None:
    async with aclosing(Broker(valkey_url)) as lost:
        told = replace(job("judge"), id=new_id("judge"))
        await lost.submit(told, Terms(rows=1, deadline_ms=60_000, max_backlog=1000, webhook=receiver.url))
        taken: list[Hook] = []
        async with asyncio.timeout(20):
            while not taken:
                taken = await lost.due_hooks("judge", 500)
    assert [(hook.id, hook.tries) for hook in taken] == [(told.id, 1)]
    async with client(valkey_url, **OPEN):
        await until(lambda: receiver.got)
    assert [verified(message)["data"]["id"] for message in receiver.got] == [told.id]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https"),
        ("ftp://example.com/", "https"),
        ("example.com", "https"),
        ("https://", "host"),
        ("https://user:pw@example.com/", "password"),
        ("https://example.com:0/", "port"),
        ("https://example.com:99999/", "URL"),
        ("https://[::1/", "URL"),
        ("https://exa mple.com/", "ASCII"),
        ("https://example.com/\r\nX: y", "ASCII"),
        ("https://bücher.example/", "ASCII"),
        ("https://127.0.0.1/", "public"),
        ("https://[::ffff:10.0.0.1]/", "public"),
        ("https://169.254.169.254/latest/meta-data", "public"),
    ],
)
async def test_urls_that_cannot_be_called_are_refused_at_submit(
    worker: Worker, valkey_url: str, url: str, why: str
) -> None:
    async with client(valkey_url, webhook_secret=SECRET) as http:
        answer = await http.post("/generate", json={"webhook": url})
        assert (answer.status_code, answer.json()["field"]) == (422, "webhook")
        assert why in answer.json()["detail"]
    assert worker.seen == []


async def test_without_a_secret_there_are_no_webhooks(http: httpx.AsyncClient, worker: Worker) -> None:
    answer = await http.post("/generate", json={"webhook": "https://example.com/"})
    assert (answer.status_code, answer.json()["field"]) == (422, "webhook")
    assert "OFFRAMP_WEBHOOK_SECRET" in answer.json()["detail"]
    assert worker.seen == []


async def test_a_name_that_leads_inside_is_refused_at_delivery(
    worker: Worker, valkey_url: str, redis: Redis, receiver: Receiver
) -> None:
    async with client(valkey_url, webhook_secret=SECRET) as http:
        answer = await http.post("/generate", json={"webhook": f"https://localhost:{receiver.port}/"})
        assert answer.status_code == 200
        await forgotten(redis)
        assert await counted(http, "refused") == 1
    assert receiver.got == []


@pytest.mark.parametrize("secret", ["hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "!" * 44, SECRET[6:]])
def test_a_wrong_secret_refuses_to_boot_and_is_not_shown(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("OFFRAMP_WEBHOOK_SECRET", secret)
    with pytest.raises(ConfigError) as stopped:
        load_settings()
    assert "OFFRAMP_WEBHOOK_SECRET=***: " in str(stopped.value)
    assert "openssl rand" in str(stopped.value)
    assert secret not in str(stopped.value) or secret == "whsec_"


def test_pauses_add_up_to_about_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [webhooks.pause_s(tries) for tries in range(1, webhooks.TRIES)]
    assert pauses[:-1] == sorted(pauses[:-1])
    assert 0.7 * 3600 < sum(pauses) < 1.3 * 3600
