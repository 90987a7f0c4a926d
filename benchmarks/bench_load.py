"""Requests of mixed length over time: capacity, waiting and memory of step-level continuous batching.

    python benchmarks/bench_load.py [--threads N]

The engine of a worker (scheduler, task, metrics) without HTTP and Redis; one image a request, 10 to 50 steps, mixed
solvers, fixed seeds, fashion-dit.

capacity   the same requests, all there at the start, through 16 slots: continuous, and in static batches of 16 that
           each run until their longest request is done. Both at full depth; then continuous with `balanced`.
wait       Poisson arrivals at 70 % of that capacity: ticks from arrival to admission.
memory     resident memory over 10,000 short requests.

The last line is JSON.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench_step import SOLVERS, mixed
from benchmarks.common import finish, ratio, setup, table
from models.api import GenerateWork
from models.evaluation.turns import alternate
from models.store import ZOO
from models.tasks.generate import GenerateTask
from models.tasks.generator import load
from service.metrics import WorkerMetrics
from service.protocol import Delivery, GenerateJob
from service.worker.engine import Engine

SLOTS, REQUESTS, REPEATS = 16, 64, 3
SHORT_REQUESTS, SHORT_STEPS = 10_000, 2


def engine_of(task: GenerateTask) -> Engine:
    """A worker's engine over the task."""
    metrics = WorkerMetrics()
    metrics.declare(task.info, "cpu")
    return Engine(task, metrics)


def delivery(number: int, work: GenerateWork) -> Delivery:
    """A request as a worker takes it."""
    job = GenerateJob(id=str(number), cost=1, work=work)
    return Delivery(job, str(number), str(number), 1, 0, 10**9, 0)


def continuous(task: GenerateTask, works: Iterable[GenerateWork]) -> None:
    """Rows enter as slots free."""
    engine, waiting = engine_of(task), [delivery(i, work) for i, work in enumerate(works)][::-1]
    while waiting or not engine.idle():
        while waiting and engine.free_rows():
            engine.offer(waiting.pop())
        engine.tick()


def static(task: GenerateTask, works: Sequence[GenerateWork]) -> None:
    """Batches of requests; a finished row keeps its place until the longest of its batch is done."""
    for first in range(0, len(works), SLOTS):
        batch = works[first : first + SLOTS]
        slots = list(range(len(batch)))
        left = [task.admit(work, [0], [slot])[0] for slot, work in zip(slots, batch, strict=True)]
        for _ in range(max(left)):
            task.step(slots)
            task.pool.done[slots] %= task.pool.evaluations[slots]
        task.collect(slots)


def capacity(task: GenerateTask) -> dict[str, Any]:
    """Requests per second of each way relative to static batches."""
    full = [mixed(i, "full") for i in range(REQUESTS)]
    balanced = [mixed(i, "balanced") for i in range(REQUESTS)]
    seconds = alternate(
        {
            "static, full": partial(static, task, full),
            "continuous, full": partial(continuous, task, full),
            "continuous, balanced": partial(continuous, task, balanced),
        },
        REPEATS,
    )
    base = seconds["static, full"]
    found: dict[str, Any] = {name: ratio(base, values) for name, values in seconds.items()}
    found["requests_per_s"] = {name: REQUESTS / statistics.median(values) for name, values in seconds.items()}
    return found


def wait(task: GenerateTask, per_s: float, requests: int = 200) -> dict[str, Any]:
    """Ticks from arrival to admission, Poisson arrivals at `per_s`."""
    draw, engine = random.Random(0), engine_of(task)
    arrivals, at = [], 0.0
    for i in range(requests):
        at += draw.expovariate(per_s)
        arrivals.append((at, delivery(i, mixed(i, "balanced"))))
    ticks: list[int] = []
    began, queue, admitted = time.perf_counter(), arrivals[::-1], set[str]()
    offered: dict[str, int] = {}
    while queue or not engine.idle():
        while queue and queue[-1][0] <= time.perf_counter() - began:
            job = queue.pop()[1]
            offered[job.attempt] = engine.ticks
            engine.offer(job)
        engine.tick()
        running = engine._scheduler._jobs.values()
        for run in running:
            if run.admitted_ms is not None and run.attempt not in admitted:
                admitted.add(run.attempt)
                ticks.append(engine.ticks - offered[run.attempt])
    return {"median": statistics.median(ticks), "p99": sorted(ticks)[int(0.99 * len(ticks))], "requests": len(ticks)}


def resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def memory(task: GenerateTask) -> dict[str, float]:
    """Resident MiB after each thousand of the short requests."""
    engine, found = engine_of(task), {}
    for i in range(SHORT_REQUESTS):
        draw = random.Random(i)
        work = GenerateWork(
            model="fashion-dit", labels=(i % 10,), seeds=(i,), steps=SHORT_STEPS, solver=draw.choice(SOLVERS),
            guidance=1.0, gear="eco",
        )  # fmt: skip
        engine.offer(delivery(i, work))
        while not engine.free_rows():
            engine.tick()
        if (i + 1) % 1000 == 0:
            found[str(i + 1)] = resident_mib()
    return found


def main() -> None:
    setup(__doc__)
    task = load(ZOO / "fashion-dit", SLOTS, "cpu")
    able = capacity(task)
    rates = able.pop("requests_per_s")
    print(f"{REQUESTS} requests, {SLOTS} slots: capacity relative to static batches\n")
    table(("way", "capacity", "requests / s"), [[name, r, f"{rates[name]:.2f}"] for name, r in able.items()])
    waited = wait(task, 0.7 * rates["continuous, balanced"])
    print(f"ticks from arrival to admission at 70 % load: median {waited['median']}, p99 {waited['p99']}\n")
    resident = memory(task)
    print(f"resident MiB over {SHORT_REQUESTS} requests")
    table(("requests", "MiB"), [[n, f"{mib:.1f}"] for n, mib in resident.items()])
    finish("load", capacity=able, requests_per_s=rates, wait=waited, resident_mib=resident)


if __name__ == "__main__":
    main()
