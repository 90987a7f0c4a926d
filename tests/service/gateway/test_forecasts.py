from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.redis_streams import Broker, Submitted
from service.errors import Cancelled
from service.gateway.admission import _answer
from service.gateway.forecasts import KEPT, LEAST, MOST, NEAR, ONE_IN, SEEN, SETTLED, Forecasts
from service.gateway.shedding import Flow
from service.protocol import LIMIT, Job, Terms
from tests.service.gateway.serving import Worker


def after(*took_s: float, foreseen_s: float = 1.0) -> Forecasts:
    """Answers of a budget of a second that took so long."""
    forecasts = Forecasts()
    for seconds in took_s:
        forecasts.came_true(foreseen_s, seconds, 1.0)
    return forecasts


def test_the_limit_is_cautious_until_something_is_known() -> None:
    assert after(*[0.9] * (SETTLED - 1)).limit() == LIMIT
    assert after(*[0.9] * SETTLED).limit() == pytest.approx(KEPT / 0.9)


def test_forecasts_that_were_too_long_let_more_in_and_too_short_ones_less() -> None:
    assert after(*[0.5] * SETTLED).limit() == MOST
    assert after(*[1.2] * SETTLED).limit() == pytest.approx(KEPT / 1.2)
    assert after(*[3.0] * SETTLED).limit() == LEAST


def test_one_in_so_many_may_be_worse() -> None:
    assert after(*[1.0] * (ONE_IN - 2), 2.0).limit() == LEAST
    assert after(*[1.0] * (ONE_IN - 1), 2.0).limit() == pytest.approx(KEPT)
    assert after(*[1.0] * (ONE_IN - 2), 2.0, 2.0).limit() == LEAST


def test_what_is_far_below_the_limit_or_was_not_foreseen_says_nothing_of_it() -> None:
    for foreseen_s in (0.0, 0.99 * NEAR * LIMIT):
        assert after(*[0.5] * SEEN, foreseen_s=foreseen_s).limit() == LIMIT
    assert after(*[0.5] * SEEN, foreseen_s=1.01 * NEAR * LIMIT).limit() != LIMIT


def test_what_was_given_up_took_the_whole_budget_at_least() -> None:
    forecasts = Forecasts()
    for _ in range(SETTLED):
        forecasts.came_true(0.8, 0.1, 1.0, given_up=True)
    assert forecasts.limit() == pytest.approx(KEPT * 0.8)


def test_old_answers_are_forgotten() -> None:
    assert after(*[2.0] * SEEN, *[1.0] * SEEN).limit() == pytest.approx(KEPT)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100), st.floats(-1, 10), st.booleans()), max_size=200))
def test_the_limit_stays_within_its_bounds(answers: list[tuple[float, float, float, bool]]) -> None:
    forecasts = Forecasts()
    for answer in answers:
        forecasts.came_true(*answer)
        assert LEAST <= forecasts.limit() <= MOST


async def test_answers_teach_the_limit_that_the_next_job_has(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, told, submit = [], [], Broker.submit

    async def foreseen(self: Broker, job: Job, terms: Terms) -> Submitted:
        limits.append(terms.limit)
        return replace(await submit(self, job, terms), foreseen_ms=250)

    def came_true(self: Forecasts, foreseen_s: float, took_s: float, budget_s: float, given_up: bool = False) -> None:
        told.append((foreseen_s, took_s < budget_s, given_up))

    monkeypatch.setattr(Broker, "submit", foreseen)
    monkeypatch.setattr(Forecasts, "came_true", came_true)
    monkeypatch.setattr(Forecasts, "limit", lambda self: 0.77)
    for headers in ({}, {"Prefer": "respond-async, wait=5"}):
        body: dict[str, Any] = {"deadline_ms": 5000}
        assert (await http.post("/generate", json=body, headers=headers)).status_code == 200
    monkeypatch.setattr(worker, "_answer", lambda delivery: None)
    assert (await http.post("/generate", json={"deadline_ms": 300})).status_code == 504
    assert limits == [0.77] * 3
    assert told == [(0.25, True, False), (0.0, True, False), (0.25, False, True)]


@pytest.mark.parametrize(("over_for_s", "limit"), [(1.0, LEAST), (-1.0, LIMIT)])
async def test_who_hangs_up_after_the_deadline_was_not_answered_in_time(over_for_s: float, limit: float) -> None:
    async def gone(*_: object) -> None:
        raise Cancelled("the client went away")

    gateway: Any = SimpleNamespace(replies=SimpleNamespace(result=gone))
    job: Any = SimpleNamespace(id="m.1", work=SimpleNamespace(model="m"))
    flow, waiter = Flow(), SimpleNamespace()
    for _ in range(SETTLED):
        due = time.monotonic() - over_for_s
        with pytest.raises(Cancelled):
            await _answer(gateway, waiter, job, due, flow, foreseen_s=1e-9)  # type: ignore[arg-type]
    assert flow.forecasts.limit() == limit
