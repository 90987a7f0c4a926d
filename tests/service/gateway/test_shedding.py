from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from service.gateway import shedding
from service.gateway.shedding import LOOK_S, LOOKS, Lag, Shed
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
