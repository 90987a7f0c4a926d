"""What a tick costs: ways to batch rows of different times and depths, gears, and what is not the network.

    python benchmarks/bench_step.py [--threads N]

Rows of fashion-dit with mixed steps (10-50), solvers and phases, unguided, at fixed seeds; the same rows for every
way of batching. Ratios are taken repeat by repeat, in turn; median and range. The last line is JSON.

sorted prefix       one batch, every row at its own depth (what Offramp does)
full depth          one batch, every block for every row: step-level batching without exits
by depth, by time   one batch for each distinct depth, each distinct diffusion time
static              full depth, and finished rows stay until the longest of the batch is done: time per useful row
one at a time       every row alone
ideal               the mean over the rows of a batch that is all of that row's depth, head and update included
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import models.tasks.generate as engine
from benchmarks.common import finish, ratio, setup, spread, table
from models.api import GenerateWork
from models.backends.interface import Backend
from models.evaluation.generate import balanced_work, run_work
from models.evaluation.turns import alternate
from models.store import ZOO
from models.tasks.generator import load
from service.metrics import WorkerMetrics
from service.protocol import Delivery, GenerateJob
from service.worker.engine import Engine

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SOLVERS = ("ddim", "ddpm", "dpmpp_2m", "unipc", "euler")
GEAR_STEPS, REPEATS = 10, 9
Task = engine.GenerateTask


def mixed(seed: int, gear: str = "balanced", guidance: float = 1.0, steps: tuple[int, int] = (10, 50)) -> GenerateWork:
    """One row with steps and solver of its own."""
    draw = random.Random(seed)
    return GenerateWork(
        model="fashion-dit",
        labels=(draw.randrange(10),),
        seeds=(seed,),
        steps=draw.randint(*steps),
        solver=draw.choice(SOLVERS),
        guidance=guidance,
        gear=gear,
    )


def fill(task: Task, batch: int, gear: str = "balanced") -> list[int]:
    """Slots 0..batch-1 with mixed rows, each at a phase of its own; returns their steps."""
    phases = random.Random(batch)
    steps = []
    for slot in range(batch):
        work = mixed(1000 * batch + slot, gear)
        [evaluations] = task.admit(work, [0], [slot])
        task.pool.done[slot] = phases.randrange(evaluations)
        steps.append(work.steps)
    return steps


def tick(task: Task, groups: Sequence[Sequence[int]]) -> None:
    """Step every group and put the rows back to where they were."""
    before = task.pool.done.copy()
    for group in groups:
        task.step(group)
    task.pool.done[:] = before


def tick_at(task: Task, slots: Sequence[int], depth: int) -> None:
    """One tick with all rows at one depth."""
    at = task.pool.done[slots]
    before = task.pool.depth[slots, at]
    task.pool.depth[slots, at] = depth
    tick(task, [slots])
    task.pool.depth[slots, at] = before


def groups_of(keys: Sequence[Any]) -> list[list[int]]:
    """Slots by equal key."""
    found: dict[Any, list[int]] = {}
    for slot, key in enumerate(keys):
        found.setdefault(key, []).append(slot)
    return list(found.values())


def strategies(task: Task, batch: int) -> dict[str, Any]:
    """Time per useful row of every way of batching, relative to full depth."""
    steps = fill(task, batch)
    slots = list(range(batch))
    at = task.pool.done[slots]
    depths = task.pool.depth[slots, at].tolist()
    runs: dict[str, Callable[[], None]] = {
        "sorted prefix": partial(tick, task, [slots]),
        "full depth": partial(tick_at, task, slots, task.model.depth),
        "by depth": partial(tick, task, groups_of(depths)),
        "by time": partial(tick, task, groups_of(task.pool.u[slots, at].tolist())),
        "one at a time": partial(tick, task, [[slot] for slot in slots]),
    }
    uniform = {f"depth {depth}": partial(tick_at, task, slots, depth) for depth in sorted(set(depths))}
    seconds = alternate(runs | uniform, REPEATS)
    full = seconds["full depth"]
    ideal = np.mean([seconds[f"depth {depth}"] for depth in depths], axis=0)
    idle = max(steps) / (sum(steps) / batch)
    return {
        "batch": batch,
        "mean_depth": sum(depths) / batch / task.model.depth,
        **{name: ratio(seconds[name], full) for name in runs},
        "static": idle,
        "ideal": ratio(ideal, full),
        "sorted / ideal": ratio(seconds["sorted prefix"], ideal),
        "full_s_per_row": spread(full).value / batch,
    }


def gears(task: Task, batch: int) -> list[dict[str, Any]]:
    """Throughput of every gear relative to `full`: same solver, steps, guidance."""
    jobs = {g.name: balanced_work(task, g, 0, batch, 0, steps=GEAR_STEPS) for g in task.info.gears}
    seconds = alternate({name: partial(run_work, task, work) for name, work in jobs.items()}, REPEATS)
    evals = {name: run_work(task, work)[1] for name, work in jobs.items()}
    return [
        {
            "batch": batch,
            "gear": name,
            "throughput": ratio(seconds["full"], seconds[name]),
            "saved": 1 - evals[name] / evals["full"],
        }
        for name in jobs
    ]


class Watch:
    """A backend and the update kernel, with the seconds spent inside."""

    def __init__(self, backend: Backend, update: Callable[..., Any]) -> None:
        self.name, self.note, self.inside = backend.name, backend.note, 0.0
        self.condition, self.forward = self.timed(backend.condition), self.timed(backend)
        self.update = self.timed(update)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = function(*args)
            self.inside += time.perf_counter() - began
            return result

        return run

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


def overhead(task: Task, batch: int, ticks: int = 50) -> dict[str, Any]:
    """Share of an engine's tick (scheduler and metrics included) that is neither network nor kernel."""
    metrics = WorkerMetrics()
    metrics.declare(task.info, "cpu")
    worker = Engine(task, metrics)
    for i in range(batch):
        job = GenerateJob(id=str(i), cost=1, work=mixed(i, guidance=2.0, steps=(60, 100)))
        worker.offer(Delivery(job, str(i), str(i), 1, 0, 10**9, 0))
    worker.tick()
    kept = task.backend, engine.update
    watch = Watch(*kept)
    task.backend, engine.update = watch, watch.update
    shares = []
    try:
        for _ in range(ticks):
            watch.inside, began = 0.0, time.perf_counter()
            worker.tick()
            shares.append(1 - watch.inside / (time.perf_counter() - began))
    finally:
        task.backend, engine.update = kept
    return {"batch": batch, "share": spread(shares)}


def main() -> None:
    setup(__doc__)
    task = load(ZOO / "fashion-dit", max(BATCHES), "cpu")
    found = [strategies(task, batch) for batch in BATCHES]
    n_sat = found[0]["full_s_per_row"] / min(row["full_s_per_row"] for row in found)
    ways = ("sorted prefix", "by depth", "by time", "one at a time", "static", "ideal", "sorted / ideal")
    print("Time per row relative to a full-depth batch of the same rows; balanced, unguided\n")
    table(
        ("rows", "mean depth", *ways),
        [
            [r["batch"], f"{r['mean_depth']:.3f}", *(f"{r[w]:.3f}" if w == "static" else r[w] for w in ways)]
            for r in found
        ],
    )
    print(f"saturation: {n_sat:.1f} rows (time of one row alone over the least time per row)\n")
    speed = [row for batch in (1, 4, 16, 32) for row in gears(task, batch)]
    print(f"Throughput of the gears relative to full, {GEAR_STEPS} steps, guidance {task.info.gears[0].guidance:g}\n")
    table(
        ("images", "gear", "throughput", "layer evals saved"),
        [[r["batch"], r["gear"], r["throughput"], f"{r['saved']:.3f}"] for r in speed],
    )
    rest = overhead(task, 16)
    print(f"Share of a tick outside network and kernel at 16 rows: {rest['share']}\n")
    finish("step", n_sat=n_sat, batching=found, gears=speed, overhead=rest)


if __name__ == "__main__":
    main()
