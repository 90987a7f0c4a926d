"""The simulator against the service: the same trace through simulated workers, and through real ones whose ticks sleep.

    python benchmarks/bench_simulator.py [--seconds S] [--workers 1,4] [--overload 0.7,2]

Real are the store, the scripts, the worker processes with their lanes and engines, and the road back; only the network
is a sleep of the shipped tick times, so that a small machine can hold many workers. Gears on; deadline three times
one image alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from benchmarks.common import finish, table
from models.api import GeneratedRow, GenerateParams
from models.registry import DESCRIPTIONS, resolve
from service.broker.embedded import Embedded
from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import DeadlineExceeded, QueueFull
from service.gateway.admission import price
from service.gateway.forecasts import Forecasts
from service.gateway.resolve import generate_work
from service.metrics import WorkerMetrics
from service.protocol import GenerateJob, Terms
from service.simulation import report
from service.simulation.fleet import Fleet, Seen
from service.simulation.fleet import Terms as SimTerms
from service.simulation.profiles import read_profile
from service.simulation.task import Clock, SimTask
from service.simulation.traces import Arrival, asking, poisson
from service.worker.engine import Engine
from service.worker.gears import TickTime
from service.worker.io import WorkerIO
from service.worker.main import Stop, loop
from service.worker.shadow import Shadow

REPO = Path(__file__).resolve().parent.parent
INFO = resolve(DESCRIPTIONS, "generate")(REPO / "models" / "zoo" / "fashion-dit")
POINTS, OF = read_profile()
DEADLINE_MS, FULL = round(3 * 20 * POINTS[0][1]), 64_000 / (20 * POINTS[-1][1])
START_S = 60.0
SHOWN = ("accepted", "refused", "expired", "accepted_in_time", "goodput_per_s", "p50_ms", "p99_ms", "compute_saved")


class Sleeping(Clock):
    """A clock that is set forward by waiting."""

    def __setattr__(self, name: str, value: float) -> None:
        time.sleep(max(0.0, value - time.monotonic()))

    def __getattribute__(self, name: str) -> Any:
        return time.monotonic() if name == "now" else object.__getattribute__(self, name)


class SleepingTask(SimTask):
    """Rows that end in a picture of one pixel; `floor_broken` and the rest travel in the receipt."""

    def collect(self, slots: Sequence[int]) -> Sequence[Any]:
        return [Picture(row) for row in super().collect(slots)]


class Picture(GeneratedRow):
    """A row as it ran, in the form of an image."""

    def __init__(self, row: Any) -> None:
        super().__init__(np.zeros((1, 1, 1), np.uint8), 0, 0, (), 0, 0)
        object.__setattr__(self, "ran", row.ran)
        object.__setattr__(self, "full", row.full)


def work_here(url: str) -> None:
    """A worker, until it is told to stop."""
    stop, wake, metrics = Stop(), threading.Event(), WorkerMetrics()
    engine = Engine(SleepingTask(INFO, 64, Sleeping(), TickTime(POINTS).ms), metrics, points=POINTS)
    metrics.declare(INFO, "none")
    io = WorkerIO(url, f"worker-{uuid4().hex[:6]}", [engine], Settings(redis_url=url), metrics, wake.set)
    io.start()
    loop([engine], io, stop, wake, Shadow([engine], metrics, share=0.0))


async def served(url: str, workers: int, arrivals: Sequence[Arrival]) -> list[Seen]:
    """A trace through the store, once all workers live; refusals and answers as a gateway would see them."""
    broker, waiting, forecasts = Broker(url), dict[str, tuple[Seen, float]](), Forecasts()
    seen = [Seen(one, DEADLINE_MS) for one in arrivals]
    end = time.monotonic() + START_S
    while await broker.live_workers(INFO.name) < workers:
        if time.monotonic() > end:
            raise RuntimeError(f"not all of {workers} workers live after {START_S:g} s; what they say is above")
        await asyncio.sleep(0.1)
    work = generate_work(GenerateParams(gear="auto", floor=arrivals[0].floor, seed=0, label=0), INFO, "png")
    cost, begun = price(work, INFO), time.monotonic() + 0.5

    async def ask(one: Seen) -> None:
        await asyncio.sleep(begun + one.arrival.at - time.monotonic())
        job = GenerateJob(id=uuid4().hex, cost=cost, work=work)
        waiting[job.id] = (one, time.monotonic())
        try:
            terms = Terms(1, DEADLINE_MS, 10**9, "bench", need_worker=True, limit=forecasts.limit())
            one.foreseen_ms = (await broker.submit(job, terms)).foreseen_ms
        except (DeadlineExceeded, QueueFull) as error:
            one.outcome = "late" if isinstance(error, DeadlineExceeded) else "full"
            if isinstance(error, DeadlineExceeded):
                forecasts.refused(error.foreseen_ms / 1000, DEADLINE_MS / 1000)
            del waiting[job.id]

    async def hear() -> None:
        last = "0"
        while True:
            told, last = await broker.replies("bench", last)
            for name, result in told:
                one, since = waiting.pop(name)
                one.took_ms, found = 1000 * (time.monotonic() - since), result or await broker.result(INFO.name, name)
                one.outcome, one.receipt = (found.outcome, found.receipt) if found else ("expired", {})
                seconds = (one.foreseen_ms / 1000, one.took_ms / 1000, DEADLINE_MS / 1000)
                forecasts.came_true(*seconds, given_up=one.outcome == "expired")

    listener = asyncio.create_task(hear())
    await asyncio.gather(*map(ask, seen))
    while waiting:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    listener.cancel()
    await asyncio.wait([listener])
    await broker.aclose()
    return seen


def real(workers: int, arrivals: Sequence[Arrival]) -> list[Seen]:
    """A store and workers of their own."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = Embedded(Path(folder))
        store.start()
        stack.callback(store.stop)
        for _ in range(workers):
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.bench_simulator", "--worker", store.url], cwd=REPO
            )
            stack.callback(child.wait, 30)
            stack.callback(child.terminate)
        return asyncio.run(served(store.url, workers, arrivals))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", default="1,4")
    parser.add_argument("--overload", default="0.7,2")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        return work_here(chosen.worker)
    found: dict[str, Any] = {}
    for workers in map(int, chosen.workers.split(",")):
        for overload in map(float, chosen.overload.split(",")):
            arrivals = asking(poisson(overload * workers * FULL, chosen.seconds, 0), Arrival(0.0, floor="eco"))
            name = f"{workers} workers, {overload:g}x"
            fleet = Fleet(INFO, POINTS, SimTerms(workers, 64, DEADLINE_MS, 10**9))
            found[f"{name}, simulated"] = report.summary(fleet, fleet.run(arrivals))
            found[f"{name}, real"] = report.summary(fleet, real(workers, arrivals)) | {"rung_changes": None}
    rows = [[name, *(f"{run[key]:.4g}" for key in SHOWN), run["gears"]] for name, run in found.items()]
    table(("run", *SHOWN, "gears"), rows)
    finish("simulator", deadline_ms=DEADLINE_MS, ticks=OF, runs=found)


if __name__ == "__main__":
    main()
