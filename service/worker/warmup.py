"""What a tick takes, measured before there is work: a generator's, by the rows that it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from models.api import GenerateWork, Task

BUDGET_S = 1.0
GOES = 3


def tick_times(
    task: Task[Any, Any], budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, float]]:
    """(blocks x network rows, milliseconds) of ticks at 1, 2, 4 ... rows, the least of three; none for a classifier.

    Ends when the slots are full or `budget_s` is spent. Leaves the task as it was: its slots are free.
    """
    info = task.info
    if info.task != "generate" or not info.gears:
        return []
    full = max(info.gears, key=lambda gear: sum(gear.schedule.depths) / len(gear.schedule.depths))
    points: list[tuple[float, float]] = []
    rows, started = 1, clock()
    while rows <= task.capacity and clock() - started < budget_s:
        slots = range(rows)
        work = GenerateWork(
            model=info.name,
            labels=(0,) * rows,
            seeds=tuple(slots),
            steps=max(full.steps, GOES + 1),
            solver=full.solver,
            guidance=full.guidance,
            gear=full.name,
            solver_options=full.solver_options,
        )
        task.admit(work, slots, slots)
        took = []
        for _ in range(GOES + 1):
            before = clock()
            done = task.step(slots).layer_evals
            took.append(1000 * (clock() - before))
        points.append((float(done), max(min(took[1:]), points[-1][1] if points else 0.0)))
        rows *= 2
    return points
