"""Quality under load: the real service at twice what gear `full` can do, with `auto` and without, in turn.

    python benchmarks/bench_gears.py [--seconds S] [--overload X] [--floor GEAR] [--data DIR] [--plot FILE]

Gateway, embedded store and worker are processes of their own, with the shipped fashion-dit. The deadline is three times
the unloaded median of `full`; capacity is that of `full` in a closed loop. Open loop, for each trace (Poisson; bursts:
5 s of 1.75 times the mean rate, 5 s of a quarter of it) and each way in turn: `full` is the same service with the gears
left alone, `auto` lets it choose down to the floor.

In time is of accepted work; the floor is checked evaluation by evaluation against what a request that names it runs.
Beside each run stands what `offramp simulate` foresees of it, with tick times measured here before.
With --data, class agreement and Frechet distance of what was served, as many images of each run (see the model's card).

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.bench_queue import Service, quantile, resident_mib
from benchmarks.common import finish, table
from models.registry import DESCRIPTIONS, resolve
from service.simulation import report
from service.simulation.fleet import Fleet, Terms
from service.simulation.profiles import Points, read_profile
from service.simulation.traces import Arrival, asking, bursts, poisson

ZOO = Path(__file__).resolve().parent.parent / "models" / "zoo"
MODEL, CLASSES = "fashion-dit", 10
TIMES = 3  # deadline over the unloaded median
REFUSED = (429, 503, 504)


@dataclass(frozen=True)
class Seen:
    """One request: when it was due (seconds), how long it took, what came."""

    due: float
    took: float
    status: int
    receipt: dict[str, Any]
    label: int
    png: bytes = b""


async def ask(http: httpx.AsyncClient, number: int, due: float, begun: float, body: dict[str, Any]) -> Seen:
    """One picture."""
    await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
    label = number % CLASSES
    try:
        answer = await http.post("/generate", json={"model": MODEL, "seed": number, "label": label, **body})
        status, found = answer.status_code, answer.json()
    except httpx.HTTPError:
        status, found = 0, {}
    took = time.perf_counter() - begun - due
    if status != 200:
        return Seen(due, took, status, {}, label)
    return Seen(due, took, status, found["receipt"], label, base64.b64decode(found["images"][0]["b64"]))


async def asked(port: int, arrivals: Sequence[float], body: dict[str, Any]) -> list[Seen]:
    """Every arrival, whatever became of earlier ones."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits, trust_env=False
    ) as http:
        begun = time.perf_counter()
        return list(await asyncio.gather(*(ask(http, i, due, begun, body) for i, due in enumerate(arrivals))))


async def closed(port: int, seconds: float, connections: int, body: dict[str, Any]) -> list[Seen]:
    """Each connection asks again when it has its answer."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
        begun, seen = time.perf_counter(), list[Seen]()

        async def loop(first: int) -> None:
            while (now := time.perf_counter() - begun) < seconds:
                seen.append(await ask(http, first + len(seen), now, begun, body))

        await asyncio.gather(*(loop(10_000 * i) for i in range(connections)))
        return seen


def run(service: Service, arrivals: Sequence[float], body: dict[str, Any], deadline_ms: int) -> dict[str, Any]:
    """One trace one way: counts by the ledger, latency, receipts; pictures under `seen`."""
    before = service.ledger(MODEL)
    seen = asyncio.run(asked(service.port, arrivals, {**body, "deadline_ms": deadline_ms}))
    time.sleep(1.0)
    after = service.ledger(MODEL)
    ledger = {name: count - before.get(name, 0) for name, count in after.items()}
    good = [one for one in seen if one.status == 200]
    late = sum(1000 * one.took > deadline_ms for one in good)
    accepted = ledger.get("accepted", 0)
    refusals = sorted(one.took for one in seen if one.status in REFUSED)[: len(seen) - accepted]
    took = [1000 * one.took for one in good]
    return {
        "offered": len(seen),
        "accepted": accepted,
        "in_time": len(good) - late,
        "accepted_in_time": (len(good) - late) / accepted,
        "goodput_per_s": (len(good) - late) / max(arrivals),
        "p50_ms": quantile(took, 0.5),
        "p95_ms": quantile(took, 0.95),
        "p99_ms": quantile(took, 0.99),
        "refused": len(refusals),
        "refusal_p50_ms": 1000 * quantile(refusals, 0.5),
        "statuses": dict(Counter(str(one.status) for one in seen)),
        "gears": dict(Counter(one.receipt["gear"] for one in good)),
        "downgraded": sum(one.receipt["downgraded"] for one in good) / max(1, len(good)),
        "compute_saved": statistics.mean(one.receipt["compute_saved"] for one in good) if good else 0.0,
        "seen": seen,
    }


def measured(folder: Path) -> Points:
    """What ticks take on this machine."""
    file = folder / "ticks.json"
    command = [sys.executable, "-m", "service.cli", "simulate", "--measure", str(file)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return read_profile(file)[0]


def simulated(arrivals: Sequence[float], body: dict[str, Any], deadline_ms: int, points: Points) -> dict[str, Any]:
    """The same trace through the simulator."""
    fleet = Fleet(resolve(DESCRIPTIONS, "generate")(ZOO / MODEL), points, Terms(deadline_ms=deadline_ms))
    return report.summary(fleet, fleet.run(asking(list(arrivals), Arrival(0.0, **body))))


def broken(seen: Sequence[Seen], floor: Sequence[int]) -> int:
    """Answers with an evaluation of fewer blocks than the floor's."""
    found = [one.receipt["exit_depths"] for one in seen if one.status == 200]
    return sum(any(ran < least for ran, least in zip(depths, floor, strict=True)) for depths in found)


def quality(runs: dict[str, dict[str, Any]], data: Path) -> dict[str, Any]:
    """Class agreement and Frechet distance of as many served pictures of each run."""
    from models.evaluation.generate import agreement, features
    from models.evaluation.metrics import frechet, frechet_interval, moments
    from models.tasks.classifier import load_members
    from models.training.data import read

    judges, test = load_members(ZOO / "fashion-ensemble"), read(data, "test")
    reference = moments(features(judges[0], test.images))
    n = min(run["accepted"] for run in runs.values())
    found = {}
    for name, run in runs.items():
        good = [one for one in run["seen"] if one.status == 200][:n]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(one.png))).reshape(28, 28, -1) for one in good])
        seen, labels = features(judges[0], pixels), np.array([one.label for one in good])
        low, high = frechet_interval(seen, reference)
        found[name] = {
            "images": len(good),
            "class_agreement": agreement(judges, pixels, labels),
            "frechet": frechet(moments(seen), reference),
            "frechet_interval": [low, high],
        }
    return found


def plot(runs: dict[str, dict[str, Any]], deadline_ms: int, file: Path) -> None:
    """Latency and gear of every answer over time."""
    from matplotlib.figure import Figure

    colours = {"full": "tab:blue", "balanced": "tab:orange", "eco": "tab:green"}
    figure = Figure(figsize=(11, 2.4 * len(runs)), layout="constrained")
    for axis, (name, run) in zip(
        figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0], runs.items(), strict=True
    ):
        for gear, colour in colours.items():
            shown = [one for one in run["seen"] if one.status == 200 and one.receipt["gear"] == gear]
            axis.plot([o.due for o in shown], [1000 * o.took for o in shown], ".", ms=3, color=colour, label=gear)
        refused = [one.due for one in run["seen"] if one.status in REFUSED]
        axis.plot(refused, [0] * len(refused), "|", color="tab:red", ms=6, label="refused")
        axis.axhline(deadline_ms, color="black", lw=0.8, ls="--")
        axis.set(title=name, ylabel="ms")
        axis.legend(loc="upper right", fontsize=7, ncols=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run; the long form takes 180")
    parser.add_argument("--overload", type=float, default=2.0, help="mean rate over the capacity of full")
    parser.add_argument("--floor", default="eco")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST (IDX), to judge what was served")
    parser.add_argument("--plot", type=Path, help="a PNG file")
    chosen = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    foreseen: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        points = measured(Path(folder))
        (zoo := Path(folder) / "zoo").mkdir()
        (zoo / MODEL).symlink_to(ZOO / MODEL)
        with Service(Path(folder), [], models=str(zoo)) as service:
            alone = asyncio.run(closed(service.port, 8.0, 1, {"gear": "full"}))[3:]
            deadline_ms = round(TIMES * 1000 * statistics.median(one.took for one in alone))
            flat = asyncio.run(closed(service.port, 12.0, 16, {"gear": "full"}))
            capacity = sum(one.due + one.took < 12.0 for one in flat) / 12.0
            [named] = asyncio.run(asked(service.port, [0.0], {"gear": chosen.floor}))
            resident = resident_mib(service.pids["worker"])
            for trace, made in (("poisson", poisson), ("bursty", bursts)):
                arrivals = made(chosen.overload * capacity, chosen.seconds, seed=0)
                ways = {"full": {"gear": "full"}, "auto": {"gear": "auto", "floor": chosen.floor}}
                for way, body in sorted(ways.items(), reverse=trace == "bursty"):
                    runs[f"{trace}, {way}"] = run(service, arrivals, body, deadline_ms)
                    foreseen[f"{trace}, {way}"] = simulated(arrivals, body, deadline_ms, points)
                    time.sleep(5.0)
            grown = [resident, resident_mib(service.pids["worker"])]
    depths = named.receipt["exit_depths"]
    for found in runs.values():
        found["floor_broken"] = broken(found["seen"], depths)
    judged = quality(runs, chosen.data) if chosen.data else {}
    if chosen.plot:
        plot(runs, deadline_ms, chosen.plot)
    show(runs, foreseen, judged, capacity, deadline_ms, chosen.overload)
    told = {name: {k: v for k, v in run.items() if k != "seen"} | judged.get(name, {}) for name, run in runs.items()}
    finish("gears", capacity_per_s=capacity, deadline_ms=deadline_ms, worker_mib=grown, runs=told, simulated=foreseen)


def show(
    runs: dict[str, Any],
    foreseen: dict[str, Any],
    judged: dict[str, Any],
    capacity: float,
    deadline_ms: int,
    overload: float,
) -> None:
    print(f"{overload:g} times the {capacity:.2f} images / s of full, deadline {deadline_ms} ms\n")
    keys = ("offered", "accepted", "refused", "accepted_in_time", "goodput_per_s", "p50_ms", "p95_ms", "p99_ms")
    more = ("refusal_p50_ms", "downgraded", "compute_saved", "floor_broken")
    rows = [[name, *(f"{run[key]:.4g}" for key in keys + more)] for name, run in runs.items()]
    table(("run", *keys, *more), rows)
    table(("run", "gears served"), [[name, run["gears"]] for name, run in runs.items()])
    both = ("accepted", "accepted_in_time", "goodput_per_s", "p50_ms", "p99_ms", "compute_saved")
    beside = {f"{name}, {of}": run[name] for name in runs for of, run in (("real", runs), ("simulated", foreseen))}
    table(("run", *both), [[name, *(f"{run[key]:.4g}" for key in both)] for name, run in beside.items()])
    if judged:
        heads = ("images", "class_agreement", "frechet", "frechet_interval")
        table(("run", *heads), [[name, *(one[key] for key in heads)] for name, one in judged.items()])


if __name__ == "__main__":
    main()
