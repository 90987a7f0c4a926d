from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.redis_streams import Broker, Submitted
from service.errors import Cancelled, DeadlineExceeded
from service.gateway.admission import _answer
from service.gateway.forecasts import KEPT, LEAST, MOST, NEAR, ONE_IN, PATIENCE, RISE, SEEN, SETTLED, Forecasts
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


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(forecasts: Forecasts, clock: Clock, seconds: float) -> None:
    """Refusals of a budget of a second, ten a second, for so long."""
    end = clock.now + seconds
    while clock.now < end:
        forecasts.refused(1.1, 1.0)
        clock.now += 0.1


def test_who_only_refuses_tries_a_higher_limit() -> None:
    """Other gateways may keep the queue so long that nothing is let in which could say that it is too low."""
    forecasts = Forecasts(clock := Clock())
    for _ in range(SETTLED):
        forecasts.came_true(1.0, 3.0, 1.0)
    refused(forecasts, clock, PATIENCE - 0.1)
    assert forecasts.limit() == LEAST
    refused(forecasts, clock, 1.0)
    assert forecasts.limit() == LIMIT
    refused(forecasts, clock, PATIENCE + 0.3)
    assert forecasts.limit() == pytest.approx(LIMIT + RISE)
    refused(forecasts, clock, 10 * PATIENCE)
    assert forecasts.limit() == MOST
    for _ in range(SETTLED):
        forecasts.came_true(1.0, 1.0, 1.0)
    assert forecasts.limit() == pytest.approx(KEPT), "what came before the rise is forgotten"


def test_refusals_beside_answers_change_nothing() -> None:
    forecasts = Forecasts(clock := Clock())
    for _ in range(10):
        refused(forecasts, clock, PATIENCE - 0.1)
        forecasts.came_true(1.0, 1.0, 1.0)
    assert forecasts.limit() == pytest.approx(KEPT)


@pytest.mark.parametrize(("foreseen_s", "pause_s"), [(1.1, 1.5), (2.0 * MOST, 0.1)], ids=["now and then", "too large"])
def test_refusals_that_say_nothing_of_the_limit(foreseen_s: float, pause_s: float) -> None:
    forecasts = Forecasts(clock := Clock())
    for _ in range(SETTLED):
        forecasts.came_true(1.0, 3.0, 1.0)
    for _ in range(100):
        forecasts.refused(foreseen_s, 1.0)
        clock.now += pause_s
    assert forecasts.limit() == LEAST


def test_old_answers_are_forgotten() -> None:
    assert after(*[2.0] * SEEN, *[1.0] * SEEN).limit() == pytest.approx(KEPT)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100), st.floats(-1, 10), st.booleans()), max_size=200))
def test_the_limit_stays_within_its_bounds(answers: list[tuple[float, float, float, bool]]) -> None:
    forecasts = Forecasts()
    for answer in answers:
        forecasts.came_true(*answer)
        forecasts.refused(answer[0], 1e-9)
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


async def test_a_refusal_is_told_to_the_limit(
    worker: Worker, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    async def late(self: Broker, job: Job, terms: Terms) -> Submitted:
        error = DeadlineExceeded("too much is ahead", field="deadline_ms")
        error.foreseen_ms = 2500
        raise error

    monkeypatch.setattr(Broker, "submit", late)
    monkeypatch.setattr(Forecasts, "limit", lambda self: 0.77)
    monkeypatch.setattr(Forecasts, "refused", lambda self, *seconds: told.append(seconds))
    for headers in ({}, {"Prefer": "respond-async"}):  # whose answers it does not learn from
        assert (await http.post("/generate", json={"deadline_ms": 2000}, headers=headers)).status_code == 504
    assert told == [(2.5, pytest.approx(2.0))]
    assert 'offramp_admission_limit{model="drawer"} 0.77' in (await http.get("/metrics")).text


@pytest.mark.parametrize(
    ("foreseen_s", "budget_s", "told"),
    [(0.01, 60.0, (False, True)), (0.01, 0.02, (True, True)), (30.0, 60.0, None)],
    ids=["later than foreseen", "after its deadline", "sooner than foreseen"],
)
async def test_who_hangs_up_says_how_long_it_waited_at_least(
    foreseen_s: float, budget_s: float, told: tuple[bool, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        await asyncio.sleep(0.05)
        raise Cancelled("the client went away")

    def came_true(self: Forecasts, foreseen_s: float, took_s: float, budget_s: float, given_up: bool = False) -> None:
        seen.append((given_up, took_s >= 0.05))

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(Forecasts, "came_true", came_true)
    gateway: Any = SimpleNamespace(replies=SimpleNamespace(result=gone))
    job: Any = SimpleNamespace(id="m.1", work=SimpleNamespace(model="m"))
    waiter: Any = SimpleNamespace()
    with pytest.raises(Cancelled):
        await _answer(gateway, waiter, job, time.monotonic() + budget_s, Flow(), foreseen_s)
    assert seen == ([told] if told else [])
