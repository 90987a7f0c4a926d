from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from service.gateway import shedding
from service.gateway.shedding import LEAST, LOOK_S, LOOKS, WARY_S, Flow, Lag, Shed
from tests.service.gateway.serving import Worker


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


def steady(flow: Flow, clock: Clock, answers: int, every_s: float, cost: float = 1.0, late: bool = False) -> None:
    for _ in range(answers):
        clock.now += every_s
        flow.answered(cost, late)


def test_a_flow_foresees_by_littles_law_once_an_answer_was_late() -> None:
    clock = Clock()
    flow = Flow(clock)
    with flow.entered(30.0):
        steady(flow, clock, 4 * LEAST, 0.01, cost=2.0)
        assert flow.seconds() == 0.0, "all answers were in time"
        steady(flow, clock, 1, 0.01, cost=2.0, late=True)
        assert flow.seconds() == pytest.approx(30 / 200, rel=0.1)
        with flow.entered(30.0):
            assert flow.seconds() == pytest.approx(60 / 200, rel=0.1)
    assert flow.seconds() == 0.0, "nothing is in flight"


def test_a_flow_that_stalls_takes_longer_and_is_wary_for_a_while_only() -> None:
    clock = Clock()
    flow = Flow(clock)
    with flow.entered(10.0):
        steady(flow, clock, 2 * LEAST, 0.01, late=True)
        before = flow.seconds()
        clock.now += 0.5
        assert flow.seconds() > 2 * before
        clock.now += WARY_S
        assert flow.seconds() == 0.0


def test_a_flow_forgets_how_fast_it_once_was() -> None:
    clock = Clock()
    flow = Flow(clock)
    with flow.entered(10.0):
        steady(flow, clock, 4 * LEAST, 0.001)
        steady(flow, clock, 2 * LEAST, 0.1, late=True)
        assert flow.seconds() == pytest.approx(1.0, rel=0.1)


async def test_work_that_would_be_late_is_refused_at_once_and_patient_work_is_not(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flow, "seconds", lambda self: 2.0)
    refused = await http.post("/generate", json={"deadline_ms": 2500})
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (
        504,
        "deadline_exceeded",
        "deadline_ms",
    )
    assert "2.00 s by now" in refused.json()["detail"]
    assert (await http.post("/generate", json={"deadline_ms": 3500})).status_code == 200


async def test_answers_that_come_late_make_a_gateway_wary(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(Flow, "answered", lambda self, cost, late: told.append((cost > 0, late)))
    assert (await http.post("/generate", json={})).status_code == 200
    monkeypatch.setattr(worker, "_answer", lambda delivery: None)
    assert (await http.post("/generate", json={"deadline_ms": 50})).status_code == 504
    assert told == [(True, False), (True, True)]
