"""What the series say of gears at work."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from service.worker.engine import Engine
from service.worker.gears import HOLD_S, Queue
from tests.service.worker.test_engine import Clock, make, sample
from tests.service.worker.test_shifting import auto, made, to_the_end
from tests.service.worker.toy import ToyGenerate
from tests.service.worker.work import delivery, draw

LONG = Queue(backlog=4000.0)  # 100 jobs, 4 s of full


def shifts(engine: Engine) -> Mapping[str, float]:
    counts = {
        reason: sample(engine, "offramp_gear_shifts_total", reason=reason)
        for reason in ("load", "deadline", "calm", "idle")
    }
    return {reason: count for reason, count in counts.items() if count}


def gears(engine: Engine) -> tuple[float, float, float]:
    return (
        sample(engine, "offramp_rung"),
        sample(engine, "offramp_gear", gear="full"),
        sample(engine, "offramp_gear", gear="half"),
    )


def test_a_worker_begins_in_the_best_gear() -> None:
    engine = made(Clock())
    assert gears(engine) == (0, 1, 0)
    assert sample(engine, "offramp_rungs") == 2


def test_load_shows_in_gear_strain_and_reason() -> None:
    engine = made(Clock())
    engine.gears.queue = LONG
    engine.offer(delivery(auto(0), budget_ms=1000))
    engine.tick()
    assert gears(engine) == (1, 0, 1)
    assert sample(engine, "offramp_strain", work="waiting") > 1
    assert shifts(engine) == {"load": 1}
    to_the_end(engine)
    assert shifts(engine) == {"load": 1}


def test_rows_that_change_as_they_run_are_counted() -> None:
    clock = Clock()
    engine = made(clock)
    engine.offer(delivery(auto(0, rows=3), budget_ms=1000))
    engine.tick()
    engine.gears.queue = LONG
    clock.now += 0.02
    engine.tick()
    assert sample(engine, "offramp_rows_shifted_total") == 3
    to_the_end(engine)
    assert sample(engine, "offramp_rows_shifted_total") == 3


def test_floor_hits_are_jobs_that_only_their_floor_keeps_dear() -> None:
    """Not a named gear, and not a job that may follow; each job once, however many ticks it has."""
    engine = made(Clock())
    engine.gears.queue = LONG
    for job in (auto(0), auto(1, ladder=("full",), rows=2), auto(2, ladder=("half",)), draw(steps=10, seed=3)):
        engine.offer(delivery(job, budget_ms=1000))
    to_the_end(engine)
    assert sample(engine, "offramp_floor_hits_total") == 1


def test_an_idle_worker_is_seen_to_recover() -> None:
    clock = Clock()
    engine = made(clock)
    engine.gears.queue = LONG
    engine.offer(delivery(auto(0), budget_ms=1000))
    to_the_end(engine)
    engine.gears.queue = Queue()
    engine.rest()
    assert gears(engine) == (1, 0, 1)
    clock.now += HOLD_S
    engine.rest()
    assert gears(engine) == (0, 1, 0)
    assert [sample(engine, "offramp_strain", work=work) for work in ("running", "waiting")] == [0, 0]
    assert shifts(engine) == {"load": 1}
    engine.offer(delivery(auto(1), budget_ms=1000))
    to_the_end(engine)
    assert gears(engine) == (0, 1, 0)
    assert shifts(engine) == {"load": 1, "idle": 1}


def test_a_worker_with_work_does_not_rest() -> None:
    clock = Clock()
    engine = made(clock)
    engine.gears.queue = LONG
    engine.offer(delivery(auto(0), budget_ms=1000))
    engine.tick()
    clock.now += 10 * HOLD_S
    engine.rest()
    assert gears(engine) == (1, 0, 1)


def test_a_model_with_one_gear_has_no_such_series() -> None:
    engine = make(ToyGenerate())
    engine.offer(delivery(draw()))
    engine.tick()
    with pytest.raises(AssertionError, match="offramp_rung"):
        sample(engine, "offramp_rung")
