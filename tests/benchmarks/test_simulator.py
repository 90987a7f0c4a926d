"""The part of bench_simulator.py that is real still fits the worker that it borrows."""

from __future__ import annotations

from benchmarks.bench_simulator import real
from service.simulation.traces import Arrival, asking, poisson


def test_a_worker_whose_ticks_sleep_answers_a_trace() -> None:
    arrivals = asking(poisson(4.0, 1.0, 0), Arrival(0.0, floor="eco"))
    assert arrivals
    assert [one.outcome for one in real(1, arrivals)] == ["ok"] * len(arrivals)
