"""What a backlog drains at, and when nobody knows."""

from __future__ import annotations

import pytest

from service.worker.rate import DrainRate


def ticks(rate: DrainRate, count: int, cost: float, seconds: float, pressed: bool) -> None:
    for _ in range(count):
        rate.ticked(cost, seconds, seconds, pressed)


def test_the_rate_under_pressure_is_known_only_under_pressure() -> None:
    rate = DrainRate()
    ticks(rate, 100, 1.0, 0.01, pressed=False)
    assert rate.pressed_per_second() == 0.0
    ticks(rate, 100, 4.0, 0.01, pressed=True)
    assert rate.pressed_per_second() == pytest.approx(400.0)
    ticks(rate, 1, 1.0, 0.01, pressed=False)
    assert rate.pressed_per_second() == 0.0


def test_a_long_pause_is_forgotten_with_the_pressure_that_it_made() -> None:
    rate = DrainRate()
    ticks(rate, 100, 4.0, 0.01, pressed=True)
    rate.ticked(4.0, 60.0, 60.0, pressed=True)
    assert rate.pressed_per_second() < 1.0
    ticks(rate, 1, 4.0, 0.01, pressed=False)
    ticks(rate, 100, 4.0, 0.01, pressed=True)
    assert rate.pressed_per_second() == pytest.approx(400.0)
