from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.worker.gears import (
    HOLD_S,
    LOOSE,
    MOST_HOLD_S,
    Arrivals,
    Governor,
    Queue,
    Row,
    Strain,
    TickTime,
    Usual,
    capacity,
    strain,
)

CALM, BUSY = [0.0, 0.0, 0.0], [3.0, 2.0, 1.5]


def after(governor: Governor, start: float, seconds: float, strains: list[float], loads: list[float]) -> float:
    """Decide ten times a second."""
    end = start + seconds
    while start < end:
        start += 0.1
        governor.decide(start, strains, loads)
    return start


def test_it_goes_down_at_once_to_the_first_rung_that_does() -> None:
    governor = Governor(3)
    assert governor.decide(0.0, [1.2, 0.9, 0.5], CALM) == 1
    assert governor.decide(0.1, [1.2, 1.1, 0.9], CALM) == 2
    assert governor.decide(0.2, BUSY, CALM) == 2


def test_where_nothing_does_it_goes_to_the_last() -> None:
    assert Governor(3).decide(0.0, BUSY, CALM) == 2


def test_it_climbs_a_rung_at_a_time_after_a_calm() -> None:
    governor = Governor(3)
    governor.decide(0.0, BUSY, CALM)
    now = after(governor, 0.0, HOLD_S - 0.2, CALM, CALM)
    assert governor.rung == 2
    now = after(governor, now, 0.5, CALM, CALM)
    assert governor.rung == 1
    after(governor, now, HOLD_S + 0.3, CALM, CALM)
    assert governor.rung == 0


@pytest.mark.parametrize(
    ("strains", "loads"),
    [([1.01, 0.2, 0.1], CALM), ([LOOSE + 0.01, 0.2, 0.1], CALM), (CALM, [0.86, 0.5, 0.4])],
    ids=["strained", "nothing to spare", "load"],
)
def test_it_does_not_climb_where_it_could_not_stay(strains: list[float], loads: list[float]) -> None:
    governor = Governor(3)
    governor.decide(0.0, [1.5, 0.5, 0.4], loads)
    after(governor, 0.0, 60.0, strains, loads)
    assert governor.rung == 1


def test_what_is_asked_for_beyond_a_rung_leads_down_before_it_strains() -> None:
    """Admission keeps the strain of accepted work within bounds by refusing the rest: cheaper comes first."""
    governor = Governor(3)
    assert governor.decide(0.0, [0.9, 0.8, 0.65], [1.6, 1.2, 0.9]) == 2
    assert Governor(3).decide(0.0, [0.2, 0.1, 0.1], [1.6, 1.2, 0.9]) == 0, "an empty service waits"


def test_an_idle_service_is_back_at_the_best() -> None:
    governor = Governor(3)
    governor.decide(0.0, BUSY, CALM)
    assert governor.decide(10.0, CALM, CALM, idle_s=HOLD_S + 0.1) == 1
    assert governor.decide(20.0, CALM, CALM, idle_s=9.0) == 0


def test_climbs_that_fail_at_once_come_rarer() -> None:
    """What looks calm from below and strains above."""
    governor, now, climbs, last = Governor(2), 0.0, [0.0], 0
    while now < 120.0:
        now += 0.1
        governor.decide(now, [1.5 if governor.rung == 0 else 0.1, 0.1], CALM[:2])
        if governor.rung < last:
            climbs.append(now)
        last = governor.rung
    gaps = [b - a for a, b in pairwise(climbs)]
    assert gaps[:4] == sorted(gaps[:4])
    assert min(gaps[4:]) > MOST_HOLD_S
    assert len(climbs) < 20


def test_after_climbs_that_lasted_they_come_sooner_again() -> None:
    governor, now = Governor(2), 0.0
    for _ in range(6):
        governor.decide(now, [1.5, 0.1], CALM[:2])
        now = after(governor, now, MOST_HOLD_S + 0.5, [0.1, 0.1], CALM[:2])
    governor.decide(now, [1.5, 0.1], CALM[:2])
    after(governor, now, HOLD_S + 0.3, [0.1, 0.1], CALM[:2])
    assert governor.rung == 0


def test_one_clump_in_a_calm_begins_it_anew() -> None:
    governor = Governor(2)
    governor.decide(0.0, [1.5, 0.1], CALM[:2])
    now = after(governor, 0.0, HOLD_S - 0.2, CALM[:2], CALM[:2])
    governor.decide(now, [1.2, 0.1], CALM[:2])
    after(governor, now, HOLD_S - 0.2, CALM[:2], CALM[:2])
    assert governor.rung == 1


levels = st.lists(st.floats(0, 4), min_size=3, max_size=3).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=200, deadline=None)
@given(seen=st.lists(st.tuples(st.floats(0.01, 1.0), st.just(0.0) | st.floats(0, 4), levels, levels), max_size=200))
def test_it_never_flaps(seen: list[tuple[float, float, list[float], list[float]]]) -> None:
    """Whatever it sees and however long it rests: no two climbs within HOLD_S, and it only goes down under strain."""
    governor, now, last_climb = Governor(3), 0.0, float("-inf")
    for step, idle_s, strains, loads in seen:
        now += step + idle_s
        before, rested = governor.rung, governor.rested(idle_s)
        assert before - rested <= idle_s / HOLD_S
        after_ = governor.decide(now, strains, loads, idle_s)
        if after_ < rested:
            assert after_ == rested - 1
            assert strains[after_] <= LOOSE
        elif after_ > rested:
            assert not enough(strains[rested], loads[rested])
            assert after_ == 2 or enough(strains[after_], loads[after_])
        if after_ < before:
            assert now - last_climb >= HOLD_S
            last_climb = now


def enough(strain: float, load: float) -> bool:
    return strain <= 1 and (strain <= LOOSE or load <= 1)


@settings(max_examples=100, deadline=None)
@given(strains=levels, more=st.floats(1.0, 3.0), start=st.integers(0, 2))
def test_more_strain_never_gives_a_better_rung(strains: list[float], more: float, start: int) -> None:
    mild, hard = Governor(3), Governor(3)
    mild.rung = hard.rung = start
    for governor in (mild, hard):  # long enough in calm for a climb
        assert governor.decide(0.0, CALM, CALM) == start
    assert mild.decide(HOLD_S, strains, CALM) <= hard.decide(HOLD_S, [more * s for s in strains], CALM)


def test_a_curve_is_straight_between_its_points_and_beyond() -> None:
    time = TickTime([(16, 10.0), (32, 14.0), (64, 26.0)])
    assert [time.ms(units) for units in (8, 16, 24, 32, 48, 128)] == [10.0, 10.0, 12.0, 14.0, 20.0, 50.0]


def test_one_factor_follows_the_present() -> None:
    time = TickTime([(16, 10.0), (32, 14.0)])
    for _ in range(2000):
        time.measured(32, 28.0)
    assert time.ms(16) == pytest.approx(20.0, rel=0.01)


def test_a_stall_is_soon_forgotten() -> None:
    time = TickTime([(16, 10.0), (32, 20.0)])
    time.measured(16, 20_000.0)
    assert time.ms(16) < 12.0
    for _ in range(200):
        time.measured(16, 10.0)
    assert time.ms(16) == pytest.approx(10.0, rel=0.15)


def test_without_a_curve_time_is_unknown_then_proportional() -> None:
    time = TickTime()
    assert (time.known, time.ms(5)) == (False, 0.0)
    time.measured(4, 20.0)
    assert time.ms(8) == pytest.approx(40.0)


def usual(budget_ms: float = 1000.0) -> Usual:
    """Rows of 10 evaluations of 16 units, 10 in the cheap rung, cost 160."""
    made = Usual(2)
    made.saw(4, 10, (16.0, 10.0), 160.0, budget_ms)
    return made


def test_capacity_is_that_of_as_many_rows_as_end_in_time() -> None:
    time = TickTime([(16, 10.0), (160, 100.0)])
    # 10 ticks of n * 10 ms within 700 ms: 7 rows, 1120 of cost in 0.7 s
    assert capacity(usual(), time, 64, 0) == pytest.approx(1600.0)
    assert capacity(usual(), time, 2, 0) == pytest.approx(1600.0)
    assert capacity(usual(1.0), time, 64, 0) == pytest.approx(1600.0), "at least one row"
    assert capacity(usual(), time, 64, 1) == pytest.approx(2560.0, rel=0.01)


def test_side_by_side_pays_where_a_tick_has_a_price_of_its_own() -> None:
    time = TickTime([(16, 10.0), (160, 20.0)])
    assert capacity(usual(), time, 64, 0) > 3 * capacity(usual(100.0), time, 64, 0)


def test_rows_that_slow_nobody_down_all_fit_whatever_the_budget() -> None:
    flat = TickTime([(16, 20.0), (1024, 21.0)])
    assert capacity(usual(250.0), flat, 64, 0) > 60 * 160.0 / 0.21


def test_nothing_is_known_before_the_first_job() -> None:
    assert capacity(Usual(2), TickTime([(1, 1.0)]), 4, 0) == 0.0
    assert capacity(usual(), TickTime(), 4, 0) == 0.0


def test_a_budget_counts_that_a_quarter_of_the_recent_jobs_have() -> None:
    """One client in a hurry is not enough to judge all others by what it needs."""
    made = usual(1000.0)
    for i in range(63):
        made.saw(1, 10, (16.0, 10.0), 160.0, 100.0 if i < 10 else 800.0)
    assert made.budget_ms == 800.0
    for _ in range(20):
        made.saw(1, 10, (16.0, 10.0), 160.0, 100.0)
    assert made.budget_ms == 100.0


def test_a_budget_that_no_rung_can_keep_is_not_counted() -> None:
    made = usual(1000.0)
    made.saw(1, 10, (16.0, 10.0), 160.0, None)
    assert made.budget_ms == 1000.0


TIME = TickTime([(16, 10.0), (160, 100.0)])


def strains(rows: list[Row], queued: float = 0.0, held: float = 0.0) -> list[Strain]:
    return strain(rows, queued, held, 1000.0, TIME, [1600.0, 2560.0])


def test_strain_of_running_rows_is_that_of_the_tightest() -> None:
    rows = [Row(5, 850.0, (16.0, 10.0)), Row(10, 425.0, (16.0, 10.0))]
    full, half = strains(rows)
    assert (full.running, full.waiting) == (pytest.approx(10 * 20.0 / 425.0 / 0.85), 0.0)
    assert half.running == pytest.approx(10 * 12.5 / 425.0 / 0.85)


@pytest.mark.parametrize("doomed", [Row(3, -50.0, (16.0, 10.0)), Row(100, 50.0, (16.0, 10.0))])
def test_rows_that_no_gear_can_help_strain_nobody(doomed: Row) -> None:
    with_it, without = strains([doomed, Row(1, 1000.0, (16.0, 10.0))])[0], Row(1, 1000.0, (16.0, 10.0))
    assert with_it.running == pytest.approx(without.left * 20.0 / 1000.0 / 0.85)


def test_a_queue_strains_by_the_time_that_it_and_what_runs_take() -> None:
    full, half = strains([], queued=400.0, held=400.0)
    assert (full.running, full.waiting) == (0.0, pytest.approx(0.5 / 0.5))
    assert half.waiting == pytest.approx(1.0 / 1.6)
    assert strains([], queued=0.0, held=1e6)[0].waiting == 0.0, "what runs is no queue"
    assert strain([], 1e6, 0.0, 1000.0, TIME, [0.0, 0.0])[0].waiting == 0.0, "unknown is no strain"


def test_arrivals_count_what_is_asked_of_each_worker() -> None:
    arrivals = Arrivals()
    for i in range(300):
        arrivals.seen(0.1 * i, Queue(asked=20.0 * i, workers=2))
    assert arrivals.per_second() == pytest.approx(100.0, rel=0.01)
    arrivals.seen(29.9, Queue(asked=50000.0))
    assert arrivals.per_second() == pytest.approx(100.0, rel=0.01), "no time has passed"
    arrivals.seen(31.0, Queue(asked=0.0))
    assert 0 < arrivals.per_second() < 100.0, "a counter that began again"


def test_arrivals_rise_within_seconds_after_an_hour_of_rest() -> None:
    arrivals = Arrivals()
    arrivals.seen(0.0, Queue())
    arrivals.seen(3600.0, Queue())
    for i in range(1, 101):
        arrivals.seen(3600.0 + 0.1 * i, Queue(asked=100.0 * i))
    assert arrivals.per_second() > 800.0
