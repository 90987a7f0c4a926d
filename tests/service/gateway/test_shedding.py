from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.gateway import shedding
from service.gateway.shedding import LEAST, LOOK_S, LOOKS, MEMORY_S, SEVERAL, WARY_S, Flow, Flows, Lag, Shed
from tests.service.gateway.serving import Worker, b64, tile


async def stalled(times: int) -> None:
    for _ in range(times):
        time.sleep(0.3)  # noqa: ASYNC251 - a loop that is kept from its work
        await asyncio.sleep(LOOK_S / 10)


async def test_lag_is_that_of_a_loop_that_is_late_again_and_again() -> None:
    async with Lag() as lag:
        await asyncio.sleep(LOOK_S * (LOOKS + 2))
        calm = lag.seconds()
        await stalled(1)
        assert lag.seconds() < calm + 0.2, "one stall is no overload"
        await stalled(2 * LOOKS)
        assert lag.seconds() > 0.2
    assert lag.seconds() == 0.0, "nobody watches"


class Behind(Lag):
    def seconds(self) -> float:
        return 1.5


async def test_a_gateway_that_is_behind_refuses_new_work_and_answers_all_else(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = (await http.post("/generate", json={}, headers={"Prefer": "respond-async"})).json()["id"]
    monkeypatch.setattr(shedding, "BEHIND_S", -1.0)
    for path in ("/generate", "/classify"):
        refused = await http.post(path, json={})
        assert (refused.status_code, refused.json()["code"], refused.headers["Retry-After"]) == (
            503,
            "unavailable",
            "1",
        )
        assert "behind" in refused.json()["detail"]
    assert (await http.get(f"/jobs/{job_id}")).status_code == 200
    assert (await http.get("/readyz")).status_code == 200
    assert 'offramp_refusals_total{model="other",reason="unavailable"} 2.0' in (await http.get("/metrics")).text
    monkeypatch.undo()
    assert (await http.post("/generate", json={})).status_code == 200


async def test_refused_work_is_not_read() -> None:
    async def never(*_: object) -> None:
        raise AssertionError("read")

    with pytest.raises(shedding.Unavailable, match=r"1\.5 s behind"):
        await Shed(never, Behind())({"type": "http", "method": "POST", "path": "/generate"}, never, never)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steady(flow: Flow, clock: Clock, answers: int, every_s: float, late: bool = False) -> None:
    for _ in range(answers):
        clock.now += every_s
        flow.answered(late)


@contextmanager
def in_flight(flow: Flow, count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(flow.entered())
        yield


def test_a_flow_foresees_by_littles_law_once_answers_were_late() -> None:
    clock = Clock()
    flow = Flow(clock)
    with in_flight(flow, 30):
        steady(flow, clock, 4 * LEAST, 0.01)
        steady(flow, clock, 1, 0.01, late=True)
        assert flow.seconds() == 0.0, "one late answer is no trend"
        steady(flow, clock, SEVERAL - 1, 0.01, late=True)
        assert flow.seconds() == pytest.approx(30 / 100, rel=0.1)
        with in_flight(flow, 30):
            assert flow.seconds() == pytest.approx(60 / 100, rel=0.1)
    assert flow.seconds() == 0.0, "nothing is in flight"


def test_a_flow_is_wary_for_a_while_only() -> None:
    clock = Clock()
    flow = Flow(clock)
    with in_flight(flow, 10):
        steady(flow, clock, 2 * LEAST, 0.01, late=True)
        before = flow.seconds()
        clock.now += 0.9 * WARY_S
        assert flow.seconds() > 2 * before, "it stalls"
        clock.now += 0.2 * WARY_S
        assert flow.seconds() == 0.0


def test_answers_that_come_in_batches_say_the_same_right_after_one() -> None:
    clock = Clock()
    flow = Flow(clock)
    with in_flight(flow, LEAST):
        for _ in range(10):
            clock.now += 1.01 * MEMORY_S
            steady(flow, clock, LEAST, 0.0, late=True)
        assert flow.seconds() == pytest.approx(MEMORY_S, rel=0.1)


def test_few_answers_say_nothing() -> None:
    clock = Clock()
    flow = Flow(clock)
    with in_flight(flow, 1):
        steady(flow, clock, 2 * LEAST, 60.0)
        steady(flow, clock, SEVERAL, 0.1, late=True)
        assert flow.seconds() == 0.0, "of a flow that is mostly idle the rate is no capacity"


def test_requests_that_differ_do_not_hold_each_other_up() -> None:
    flows = Flows()
    one = flows.of("m", "normal", 3.0)
    assert one is flows.of("m", "normal", 3.9)
    others = [flows.of("m", "high", 3.0), flows.of("n", "normal", 3.0), flows.of("m", "normal", 300.0)]
    assert one not in others
    one.refuse(7)
    one.refuse(5)
    assert (one.refused(), one.refused()) == (12, 0)


@pytest.mark.parametrize(("path", "body"), [("/generate", {}), ("/classify", {"image": b64(tile(3, "png"))})])
async def test_work_that_would_be_late_is_refused_at_once_and_patient_work_is_not(
    worker: Worker, http: httpx.AsyncClient, valkey_url: str, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    assert (await http.post(path, json=body | {"deadline_ms": 3000})).status_code == 200
    monkeypatch.setattr(Flow, "seconds", lambda self: 2.0)
    key = {"Idempotency-Key": uuid4().hex}
    async with Redis.from_url(valkey_url) as redis:
        model = worker.seen[-1].work.model
        before = int(await redis.hget(f"{keys.prefix(model)}turns", "asked"))  # type: ignore[misc]
        refused = await http.post(path, json=body | {"deadline_ms": 2500})
        assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (
            504,
            "deadline_exceeded",
            "deadline_ms",
        )
        assert "2.00 s by now" in refused.json()["detail"]
        assert (await http.post(path, json=body | {"deadline_ms": 2500}, headers=key)).status_code == 200, "attaches"
        assert (await http.post(path, json=body | {"deadline_ms": 3500})).status_code == 200
        after = int(await redis.hget(f"{keys.prefix(model)}turns", "asked"))  # type: ignore[misc]
    assert after - before == 3 * worker.seen[-1].cost, "what was refused was asked for too"


async def test_answers_that_come_late_make_a_gateway_wary(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(Flow, "answered", lambda self, late: told.append(late))
    assert (await http.post("/generate", json={})).status_code == 200
    monkeypatch.setattr(worker, "_answer", lambda delivery: None)
    assert (await http.post("/generate", json={"deadline_ms": 300})).status_code == 504
    assert told == [False, True]
