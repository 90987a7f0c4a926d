"""The whole measurement of the engine on a GPU, in one call of at most ten minutes.

    python -m benchmarks.gpu.bench_engine --out DIR [--models FOLDER ...] [--seconds 480] [--toy]

Sections are independent: each has a share of the time, one that fails leaves its traceback, and the JSON
(DIR/engine.json) is written after each, and within the first, which compiles.
Models: the folders that are named, else random weights at the size of CIFAR-10
(a DiT and a U-ViT of about 10 M parameters, patch 2), and fashion-dit. The last table is what the targets say.

limits      copy bandwidth, matrix products by precision, a launch, a replay
network     time per row-evaluation by rows, precision and backend; n_sat; share of the matrix limit
exits       batches of mixed depths beside full depth and beside the mean over depths
engine      ticks a second at one row with scheduler and metrics around the task
quality     images in float32 and bfloat16 beside a plain loop's
batch       images a second by batch, of that loop and of the engine
equal       images a second beside that loop, which runs static batches at full depth, eager and compiled
mixed       the same for requests of 10 to 50 steps
load        p50 and p99 of Poisson arrivals at 80 % of the capacity
ticks       ticks a second at one row and at 64, and the share of them outside kernels, with the dearest kernels;
            last, since a profiler may slow down what comes after it

`--toy` runs the same code at tiny size in under a minute, on a CPU where there is nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.bench_models import Subject, stand_in, subjects
from benchmarks.gpu.bench_network import LONG, Loaded, exits, network, ticks
from benchmarks.gpu.bench_plain import continuous, poisson, poisson_plain, requests
from benchmarks.gpu.bench_targets import commit, show, targets
from benchmarks.gpu.bench_timing import Bench, Clock, ceilings, facts, ratios, summary
from models.api import GenerateWork, SolverName
from models.tasks.generate import GenerateTask

EQUAL, MIXED, TOY_EQUAL, TOY_MIXED = (20, 20), (10, 50), (2, 2), (2, 4)
SLOTS, TOY_SLOTS = 1024, 4
SHARES = (3.0, 1.6, 1.0)  # of the time, by model
PROFILED = 0.1  # of a model's
LOAD, LOAD_S = 0.8, 15.0
CHECKED: tuple[tuple[SolverName, str, float], ...] = (
    ("ddpm", "full", 2.0),
    ("dpmpp_2m", "balanced", 2.0),
    ("ddim", "balanced", 1.0),
)
ENOUGH = 0.93  # of the best throughput
SECONDS = 480.0
LEAST_S = 60.0  # for another model
PLAIN_S = 40.0  # time left below which the plain loop is not compiled


class Report:
    """What was found, on disk after every section."""

    def __init__(self, out: Path, head: dict[str, Any]) -> None:
        self.path, self.found = out / "engine.json", {"benchmark": "engine", **head, "sections": dict[str, Any]()}
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def section(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a section; None and its traceback in the report where it fails."""
        print(f"{time.monotonic() - self.began:6.1f} s  {name}", flush=True)
        began, result = time.monotonic(), None
        try:
            result = run()
            entry = {"found": result}
        except Exception:
            entry = {"error": traceback.format_exc()}
            print(entry["error"], flush=True)
        self.found["sections"][name] = entry | {"took_s": round(time.monotonic() - began, 1)}
        self.write()
        return result

    def keep(self, name: str, found: Any) -> None:
        """What a section has by now."""
        self.found["sections"][name] = {"found": found}
        self.write()

    def write(self) -> None:
        """With what it says of the targets so far; a crash leaves the report of before."""
        self.found["targets"] = targets(self.found)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found, indent=1))
        fresh.replace(self.path)


def off(images: Any, reference: Any) -> dict[str, float]:
    """How far images are, in levels."""
    gap = np.abs(images.astype(int) - reference.astype(int))
    return {"mean": float(gap.mean()), "over_1": float((gap > 1).mean()), "most": int(gap.max())}


def quality(loaded: Loaded, n: int) -> dict[str, Any]:
    """Images beside a plain float32 loop's: the same requests, seeds and steps, full depth."""
    task = loaded.task("fp32", "eager")
    works = requests(task, n, TOY_EQUAL if loaded.bench.toy else EQUAL)
    reference, found = loaded.plain("fp32", n).run(works), dict[str, Any]()
    wanted = ("fp32", "eager"), ("bf16", "eager"), ("bf16", "cudagraph"), ("bf16", "compiled_cudagraph")
    for name, one in loaded.usable(*wanted).items():
        found[name] = off(continuous(one, works, min(n, loaded.slots)), reference)
        found |= alone_and_apart(loaded, name, one, works)
    found["plain autocast"] = off(loaded.plain("autocast", n).run(works), reference)
    for name, gap in found.items():
        print(f"    {name:<24} {gap}")
    return found


def alone_and_apart(
    loaded: Loaded, name: str, task: GenerateTask, works: Sequence[GenerateWork]
) -> dict[str, dict[str, float]]:
    """A way of running beside itself at other batches, and beside the op-by-op way of its precision.

    The second with what the plain loop has not: noise, history, mixed depths, no guidance; few rows and many.
    """
    n = min(len(works), loaded.slots)
    found = {f"{name}, few rows at a time": off(continuous(task, works, min(4, n)), continuous(task, works, n))}
    plain = loaded.task(name.split("/")[0], "eager")
    if plain is task:
        return found
    for solver, gear, guidance in CHECKED:
        asked = [replace(work, solver=solver, gear=gear, guidance=guidance) for work in works]
        for rows in sorted({min(4, n), n}):
            gap = off(continuous(task, asked, rows), continuous(plain, asked, rows))
            found[f"{name} beside eager, {solver}, {gear}, guidance {guidance:g}, {rows} rows"] = gap
    return found


def throughput(loaded: Loaded, steps: tuple[int, int], batch: int, share_s: float) -> dict[str, Any]:
    """Images a second: plain loops, engines at full depth, and gears of the best engine; by turns, for `share_s` once
    all are warm."""
    bench, (_, best) = loaded.bench, loaded.best()
    n = batch if bench.toy else 6 * batch
    full = requests(best, n, steps)
    runs: dict[str, Callable[..., Any]] = {}
    compiles = bench.cuda and loaded.clock.left() > PLAIN_S
    for way in ("autocast", "bf16", *(("compiled",) if compiles else ())):
        runs[f"plain {way}"] = loaded.plain(way, batch).run
    for name, task in loaded.built().items():
        runs[f"full {name}"] = partial(continuous, task, slots=batch)
    for gear in best.info.gears:
        if gear.name != "full":
            runs[f"{gear.name} best"] = partial(continuous, best, slots=batch)
    works = {name: full if " best" not in name else requests(best, n, steps, name.split()[0]) for name in runs}
    faults = dict[str, str]()
    for name in list(runs):
        try:
            runs[name](works[name][:batch])
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
            print(f"    {name} is left out: {faults[name]}")
            del runs[name]
    seconds = bench.turns(
        {name: partial(way, works[name]) for name, way in runs.items()}, 5, loaded.clock.part(share_s)
    )
    eager = [values for name, values in seconds.items() if name in ("plain autocast", "plain bf16")]
    plain = min(eager, key=sum)
    found: dict[str, Any] = {"ways": {}, "batch": batch, "requests": n, "steps": steps, "turns": len(plain)}
    found["faults"] = faults
    for name, values in seconds.items():
        found["ways"][name] = {"images_per_s": n / summary(values)["median"], "over_plain": ratios(plain, values)}
        if "plain compiled" in seconds:
            found["ways"][name]["over_compiled"] = ratios(seconds["plain compiled"], values)
        speed, over = found["ways"][name]["images_per_s"], found["ways"][name]["over_plain"]["median"]
        print(f"    {name:<30} {speed:9.1f} images / s  {over:.2f} of the plain loop")
    return found


def best_batch(loaded: Loaded, clock: Clock) -> dict[str, Any]:
    """Images a second of plain bf16 and the best engine, full depth, by batch; the least that is near both's best."""
    bench, (_, best) = loaded.bench, loaded.best()
    found: dict[str, dict[int, float]] = {"plain": {}, "engine": {}}
    for batch in [2, 4] if bench.toy else [32, 64, 128, 256, 512]:
        if batch > loaded.slots or (found["plain"] and clock.left() <= 0):
            break
        works = requests(best, 2 * batch, TOY_EQUAL if bench.toy else EQUAL)
        plain = loaded.plain("bf16", batch)
        for name, run in (("plain", partial(plain.run, works)), ("engine", partial(continuous, best, works, batch))):
            run()
            found[name][batch] = len(works) / bench.wall(run)
    most = {name: max(speeds.values()) for name, speeds in found.items()}
    near = [b for b in found["plain"] if all(speeds[b] >= ENOUGH * most[name] for name, speeds in found.items())]
    chosen = min(near, default=max(found["plain"]))
    print(f"    best batch {chosen}: {found}")
    return {"images_per_s": found, "chosen": chosen}


def engine(loaded: Loaded) -> dict[str, float]:
    """Ticks a second at one row with the worker's engine around the task: scheduler, gears, metrics. Needs msgspec."""
    from benchmarks.bench_load import delivery, engine_of
    from benchmarks.gpu.road import versioned

    bench, (_, best) = loaded.bench, loaded.best()
    sys.path.extend(versioned(loaded.cache))
    worker, [work] = engine_of(best), requests(best, 1, (LONG, LONG), guidance=1.0)
    worker.offer(delivery(0, work))
    times = 3 if bench.toy else 300
    for _ in range(5):
        worker.tick()
    per_s = times / bench.wall(lambda: [worker.tick() for _ in range(times)])
    print(f"    {per_s:.1f} ticks / s")
    return {"ticks_per_s": per_s}


def load(loaded: Loaded, capacity: dict[str, float], batch: int, clock: Clock) -> dict[str, Any]:
    """Latency at 80 % of what each can do with requests of mixed steps."""
    (_, best), found, toy = loaded.best(), dict[str, Any](), loaded.bench.toy
    for name, per_s in capacity.items():
        part = min(LOAD_S, clock.left() / 2)
        rate, steps = LOAD * per_s, TOY_MIXED if toy else MIXED
        n = 6 if toy else max(50, min(20_000, int(rate * part)))
        if clock.left() <= 0:
            break
        if name.startswith("plain"):
            plain = loaded.plain(name.removeprefix("plain "), batch)
            plain.draw(requests(best, batch, steps))
            found[name] = poisson_plain(plain, requests(best, n, steps), rate)
        else:
            found[name] = poisson(best, requests(best, n, steps, name), batch, rate)
        print(f"    {name:<14} {found[name]}")
    return found


def measure(bench: Bench, subject: Subject, report: Report, limits: dict[str, float], clock: Clock, slots: int) -> None:
    """All sections of one model within the clock."""
    total = clock.left()
    most = clock.part((1 - PROFILED) * total)

    def share(part: float) -> Clock:
        return most.part(part * total)

    with tempfile.TemporaryDirectory() as cache:
        loaded = Loaded(bench, subject, slots, Path(cache), most)
        first = f"{subject.name}/network"
        found = report.section(first, lambda: network(loaded, limits, share(0.3), partial(report.keep, first)))
        ways = (found or {}).get("ways", {})
        n_sat = next((ways[name]["n_sat"] for name in loaded.built() if name in ways), 2)
        report.section(f"{subject.name}/engine", lambda: engine(loaded))
        report.section(f"{subject.name}/exits", lambda: exits(loaded, n_sat, share(0.12)))
        report.section(f"{subject.name}/quality", lambda: quality(loaded, 4 if bench.toy else 64))
        batches = report.section(f"{subject.name}/batch", lambda: best_batch(loaded, share(0.1)))
        chosen = (batches or {"chosen": 2 if bench.toy else 64})["chosen"]
        equal, mixed = (TOY_EQUAL, TOY_MIXED) if bench.toy else (EQUAL, MIXED)
        report.section(f"{subject.name}/equal", lambda: throughput(loaded, equal, chosen, 0.1 * total))
        speed = report.section(f"{subject.name}/mixed", lambda: throughput(loaded, mixed, chosen, 0.15 * total))
        able = {name: way["images_per_s"] for name, way in (speed or {"ways": {}})["ways"].items()}
        rates = {"full": able.get(f"full {loaded.best()[0]}", 0.0), "balanced": able.get("balanced best", 0.0)}
        rates |= {"plain bf16": able.get("plain bf16", 0.0)}
        known = {name: rate for name, rate in rates.items() if rate}
        report.section(f"{subject.name}/load", lambda: load(loaded, known, chosen, share(0.12)))
        report.section(f"{subject.name}/ticks", lambda: ticks(loaded, clock.part(PROFILED * total)))


def run(out: Path, models: Sequence[Path], seconds: float, toy: bool, of: str = "") -> dict[str, Any]:
    """Everything; what engine.json holds."""
    began = Clock(seconds)
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), toy)
    report = Report(out, {"date": time.strftime("%Y-%m-%d"), "commit": of or commit(), "machine": facts(bench)})
    print(json.dumps(report.found["machine"]))
    limits = report.section("limits", lambda: ceilings(bench)) or {}
    limits = {f"{name}_flop_per_s": limits.get(f"{name}_flop_per_s", float("nan")) for name in ("fp32", "bf16")}
    with tempfile.TemporaryDirectory() as scratch, stand_in(toy and not bench.cuda):
        todo = subjects(models, Path(scratch), toy)
        report.found["models"] = [vars(one) | {"folder": one.folder.name} for one in todo]
        for i, subject in enumerate(todo):
            if i and began.left() < LEAST_S:
                report.found["left_out"] = [one.name for one in todo[i:]]
                break
            parts = [*SHARES, *[SHARES[-1]] * len(todo)][i : len(todo)]
            clock = began.part(began.left() * parts[0] / sum(parts))
            measure(bench, subject, report, limits, clock, TOY_SLOTS if toy else SLOTS)
            gc.collect()  # tasks hold each other in cycles
            if bench.cuda:
                torch.cuda.empty_cache()
    report.found["took_s"] = round(time.monotonic() - report.began, 1)
    report.write()
    show(report.found["targets"])
    return report.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for engine.json")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="generator folders, best first")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--commit", default="", help="what the tables say where there is no repository")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: the dry run")
    given = parser.parse_args()
    if given.toy:
        torch.set_num_threads(1)
    found = run(given.out, given.models, given.seconds, given.toy, given.commit)
    print(json.dumps({"benchmark": "engine", "took_s": found["took_s"], "targets": found["targets"]}))


if __name__ == "__main__":
    main()
