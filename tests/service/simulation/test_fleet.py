"""Whole runs: nothing is lost, floors hold, the same seed gives the same, and gears keep more promises than none."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from models.registry import DESCRIPTIONS, resolve
from service.errors import OfframpError
from service.protocol import LIMIT
from service.simulation import report
from service.simulation.fleet import Fleet, Terms
from service.simulation.profiles import read_profile
from service.simulation.traces import Arrival, asking, bursts, poisson

ZOO = Path(__file__).parents[3] / "models" / "zoo"
INFO = resolve(DESCRIPTIONS, "generate")(ZOO / "fashion-dit")
POINTS, _ = read_profile()
FULL = 6.8  # images per second of a worker in gear full, by these points


def served(arrivals, **terms):
    fleet = Fleet(INFO, POINTS, Terms(**{"deadline_ms": 600, **terms}))
    seen = fleet.run(arrivals)
    return fleet, seen, report.summary(fleet, seen)


def mixed(rate, seconds, seed=0):
    """Arrivals of every kind: rows, gears, floors, deadlines, ranks, steps."""
    kinds = [
        Arrival(0.0, floor="balanced"),
        Arrival(0.0, n=3, deadline_ms=30_000, priority="low"),
        Arrival(0.0, gear="full", deadline_ms=5000, priority="high"),
        Arrival(0.0, gear="eco", steps=5, deadline_ms=200),
        Arrival(0.0, n=12, floor=0.95, deadline_ms=20_000),
        Arrival(0.0, floor="eco", max_compute=0.65, deadline_ms=2000),
    ]
    times = poisson(rate, seconds, seed)
    return [asking([at], kinds[i % len(kinds)])[0] for i, at in enumerate(times)]


@pytest.mark.parametrize(("workers", "slots"), [(1, 64), (3, 4)])
def test_every_request_ends_once_and_the_books_balance(workers, slots):
    arrivals = mixed(6.0 * workers, 20.0)
    fleet, seen, run = served(arrivals, workers=workers, slots=slots, noise=0.2)
    assert len(seen) == len(arrivals)
    assert {one.outcome for one in seen} <= {"ok", "late", "full", "expired"}
    outcomes = Counter(one.outcome for one in seen)
    assert run["accepted"] == outcomes["ok"] + outcomes["expired"]
    assert outcomes["ok"] > 20
    assert outcomes["late"] + outcomes["expired"] > 0
    assert fleet.backlog == 0
    assert not any(worker.held or worker.engine.gears.queue.backlog < 0 for worker in fleet.workers)
    assert sum(second["offered"] for second in report.series(fleet, seen)) == len(arrivals)


def test_floors_and_named_gears_hold_under_any_load():
    _, seen, run = served(mixed(12.0, 20.0))
    good = [one for one in seen if one.outcome == "ok"]
    assert run["floor_broken"] == 0
    for one in good:
        if one.arrival.gear != "auto":
            assert one.receipt["gear"] == one.arrival.gear
            assert not one.receipt["downgraded"]
        if one.arrival.floor in ("balanced", 0.95):
            assert one.receipt["gear"] in ("full", "balanced")
        if one.arrival.max_compute:
            assert one.receipt["gear"] == "eco"
            assert not one.receipt["downgraded"]
    assert any(one.receipt["gear"] == "balanced" and one.receipt["downgraded"] for one in good)


def test_a_broken_floor_would_be_seen(monkeypatch):
    monkeypatch.setattr("service.worker.shifting.moved", lambda work, rung: replace(work, gear="eco"))
    _, _, run = served(asking(poisson(FULL, 5.0, 0), Arrival(0.0, floor="balanced")))
    assert run["floor_broken"] > 0


def test_a_seed_decides_everything():
    first, again, other = (
        [(one.outcome, one.took_ms) for one in served(mixed(12.0, 10.0), workers=2, noise=0.1, seed=seed)[1]]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_unloaded_a_request_takes_its_evaluations_and_runs_in_full():
    _, seen, run = served(asking([0.0, 2.0, 4.0], Arrival(0.0, floor="eco")))
    assert run["gears"] == {"full": 3}
    assert run["compute_saved"] == 0
    assert [one.took_ms for one in seen] == pytest.approx([20 * POINTS[0][1] + 5] * 3, abs=0.01)


def test_workers_share_the_queue():
    fleet, _, one_worker = served(asking(poisson(2 * FULL, 20.0, 0), Arrival(0.0, floor="eco")))
    pair, _, two_workers = served(asking(poisson(2 * FULL, 20.0, 0), Arrival(0.0, floor="eco")), workers=2)
    assert two_workers["refused"] < one_worker["refused"]
    ticks = [worker.engine.ticks for worker in pair.workers]
    assert min(ticks) > 0.7 * max(ticks)
    assert not pair.backlog + fleet.backlog


@pytest.mark.parametrize("made", [poisson, bursts])
def test_at_twice_the_capacity_gears_serve_more_and_no_later(made):
    arrivals = asking(made(2 * FULL, 40.0, 0), Arrival(0.0, floor="eco"))
    (_, _, on), (_, seen, off) = served(arrivals), served(arrivals, adapt=False)
    assert on["accepted_in_time"] >= off["accepted_in_time"] >= 0.95
    assert on["goodput_per_s"] > 1.25 * off["goodput_per_s"]
    assert 0 < on["compute_saved"] <= 0.4
    assert off["compute_saved"] == 0
    assert {one.receipt.get("gear") for one in seen} == {"full", None}


def test_admission_follows_its_answers(monkeypatch):
    arrivals = asking(poisson(2 * FULL, 40.0, 0), Arrival(0.0, floor="eco"))
    fleet, seen, learned = served(arrivals)
    limit = fleet._forecasts(seen[0]).limit()
    assert limit > LIMIT
    monkeypatch.setattr("service.gateway.forecasts.Forecasts.came_true", lambda *_, **__: None)
    monkeypatch.setattr("service.gateway.forecasts.Forecasts.refused", lambda *_: None)
    _, _, fixed = served(arrivals)
    assert learned["in_time"] > fixed["in_time"]


def test_after_a_crowd_the_best_gear_comes_back():
    crowd = poisson(3 * FULL, 10.0, 0)
    calm = [10.0 + 0.5 * i for i in range(120)]
    fleet, seen, run = served(asking(crowd + calm, Arrival(0.0, floor="eco")))
    assert run["gears"]["eco"] > 50
    assert {one.receipt["gear"] for one in seen[-40:]} == {"full"}
    assert fleet.samples[-1][1] == 0


def test_a_hundred_workers():
    arrivals = asking(poisson(100 * FULL, 1.5, 0), Arrival(0.0, floor="eco"))
    fleet, seen, run = served(arrivals, workers=100, max_backlog=50_000_000)
    assert run["accepted"] > 700
    assert sum(worker.engine.ticks > 5 for worker in fleet.workers) > 90
    assert fleet.backlog == 0
    assert all(one.outcome for one in seen)


def test_a_gear_that_does_not_exist_is_told_apart():
    with pytest.raises(OfframpError, match="best"):
        served([Arrival(0.0, gear="best")])


def test_workers_share_evenly_enough_to_keep_deadlines():
    arrivals = asking(poisson(4 * 2 * FULL, 20.0, 0), Arrival(0.0, floor="eco"))
    _, _, run = served(arrivals, workers=4)
    assert run["accepted_in_time"] > 0.99
    assert run["goodput_per_s"] > 0.95 * 4 * FULL / 0.6, "nearly what eco can do"


def test_a_quiet_service_stays_in_the_best_gear():
    _, _, run = served(asking(poisson(0.2 * FULL, 60.0, 0), Arrival(0.0, floor="eco")), noise=0.2)
    assert run["gears"]["full"] > 0.9 * run["accepted"]
