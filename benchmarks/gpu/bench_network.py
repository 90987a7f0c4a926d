"""Sections about the network and the tick: time per row-evaluation, exits against their ideal, what is not kernels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench_models import Subject
from benchmarks.gpu.bench_plain import Plain
from benchmarks.gpu.bench_timing import Bench, Clock, kernels
from models.api import GenerateWork
from models.backends.parts import example_rows
from models.tasks.generate import GenerateTask

NEAR = 1.10  # n_sat: the fewest rows whose time per row is within this of the best
WAYS = (
    *(("fp32", "eager"), ("bf16", "eager"), ("bf16", "cudagraph")),
    *(("bf16", "compiled_cudagraph"), ("bf16", "compiled")),
)
LONG = 1000  # steps of a row that ticks are timed with
COMPILING_S = 100.0  # time left below which nothing is compiled


@dataclass
class Loaded:
    """Tasks of one subject by (precision, backend), and plain loops, made when first asked for; faults say why not."""

    bench: Bench
    subject: Subject
    slots: int
    cache: Path
    clock: Clock
    tasks: dict[tuple[str, str], GenerateTask] = field(default_factory=dict)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    built_s: dict[str, float] = field(default_factory=dict)
    plains: dict[tuple[str, int], Plain] = field(default_factory=dict)
    order: list[str] = field(default_factory=lambda: ["compiled_cudagraph", "cudagraph", "eager"])

    def _refuse(self, precision: str, backend: str) -> None:
        """Raise where there is no sense or no time to build one."""
        late = "compiled" in backend and self.clock.left() < COMPILING_S
        if late or ("compiled" in backend and not self.bench.cuda):
            self.faults[precision, backend] = "no time left to compile" if self.bench.cuda else "only on CUDA"
            raise RuntimeError(self.faults[precision, backend])

    def task(self, precision: str, backend: str) -> GenerateTask:
        """RuntimeError with the first reason where it cannot be built."""
        key = precision, backend
        if key in self.faults:
            raise RuntimeError(self.faults[key])
        if key not in self.tasks:
            self._refuse(*key)
            began = time.monotonic()
            try:
                where = str(self.bench.device)
                self.tasks[key] = self.subject.load(self.slots, where, backend, precision, self.cache, 60.0)
            except Exception as error:
                self.faults[key] = f"{type(error).__name__}: {error}"
                raise
            self.built_s["/".join(key)] = round(time.monotonic() - began, 1)
        return self.tasks[key]

    def usable(self, *wanted: tuple[str, str]) -> dict[str, GenerateTask]:
        """Those of `wanted` that can be built, by `precision/backend`; graphs and compilers are for CUDA."""
        found = {}
        for precision, backend in wanted:
            said = (precision, backend) in self.faults
            try:
                found[f"{precision}/{backend}"] = self.task(precision, backend)
            except Exception as error:
                if not said:
                    print(f"    {precision}/{backend} is left out: {error}")
        return found

    def drop(self, name: str, error: Exception) -> None:
        """Leave out one that was built but does not run."""
        precision, backend = name.split("/")
        self.faults[precision, backend] = f"{type(error).__name__}: {error}"
        del self.tasks[precision, backend]
        print(f"    {name} is left out: {error}")

    def plain(self, way: str, batch: int) -> Plain:
        """A plain loop, kept: it compiles once."""
        if (way, batch) not in self.plains:
            self.plains[way, batch] = Plain(self.best()[1], self.subject.folder, way, batch)
        return self.plains[way, batch]

    def built(self) -> dict[str, GenerateTask]:
        """What runs in bfloat16 already, fastest first by `order`; nothing more is built."""
        return {f"bf16/{b}": self.tasks["bf16", b] for b in self.order if ("bf16", b) in self.tasks}

    def best(self) -> tuple[str, GenerateTask]:
        """The fastest of what can be built in bfloat16, and its name."""
        for backend in self.order:
            for found in self.usable(("bf16", backend)).items():
                return found
        raise RuntimeError(f"nothing runs: {self.faults}")

    def ranked(self, per_row: dict[str, float]) -> None:
        """Order backends by seconds per row; those without any come last, as they were."""
        self.order.sort(key=lambda backend: per_row.get(f"bf16/{backend}", math.inf))


Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(task: GenerateTask, rows: int) -> Inputs:
    """Random x, t and labels of `rows` network rows."""
    place = SimpleNamespace(backbone=task.model, device=task.device)
    return example_rows(place, rows)  # type: ignore[arg-type]


def evaluation(task: GenerateTask, given: Inputs, depths: list[int]) -> Callable[[], Any]:
    """The network's part of a tick: condition and forward."""
    x, t, label = given
    return lambda: task.backend(x, task.backend.condition(t, label), depths)


def rows_up_to(most: int) -> list[int]:
    """1, 2, 4 ... most."""
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def saturation(per_row: dict[int, float]) -> int:
    """Fewest rows whose time per row is near the best."""
    least = min(per_row.values())
    return min(rows for rows, s in per_row.items() if s <= NEAR * least)


def network(
    loaded: Loaded, limits: dict[str, float], clock: Clock, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Seconds by rows at full depth, by precision and backend, beside the matrix limit; n_sat of each.

    `keep` is told what there is after each: the next may take long to compile.
    """
    subject, bench, found = loaded.subject, loaded.bench, dict[str, Any]()

    def told() -> dict[str, Any]:
        return {"ways": found, "built_s": loaded.built_s, "faults": {"/".join(k): v for k, v in loaded.faults.items()}}

    for precision, backend in WAYS:
        if clock.left() <= 0:
            break
        tasks = loaded.usable((precision, backend))
        for name, task in tasks.items():
            depth, limit, seconds = task.model.depth, limits[f"{precision}_flop_per_s"], dict[int, float]()
            try:
                for rows in rows_up_to(2 * loaded.slots):
                    seconds[rows] = bench.seconds(evaluation(task, inputs(task, rows), [depth] * rows), 7)
            except Exception as error:
                loaded.drop(name, error)
                continue
            per_row = {rows: s / rows for rows, s in seconds.items()}
            found[name] = {
                "seconds": seconds,
                "n_sat": saturation(per_row),
                "least_row_s": min(per_row.values()),
                "share_of_matmul": {rows: subject.flops[depth] / s / limit for rows, s in per_row.items()},
            }
            shown = found[name]
            share = max(shown["share_of_matmul"].values())
            print(f"    {name:<24} n_sat {shown['n_sat']:>5}  {1e6 * shown['least_row_s']:.2f} us a row  {share:.1%}")
        keep(told())
    loaded.ranked({name: way["least_row_s"] for name, way in found.items()})
    return told()


def exits(loaded: Loaded, n_sat: int, clock: Clock) -> list[dict[str, Any]]:
    """What a batch of mixed depths takes beside full depth and beside the mean over batches of one depth each."""
    bench, found = loaded.bench, []
    most = 2 * loaded.slots
    for name, task in loaded.built().items():
        for gear in task.info.gears:
            if gear.name == "full":
                continue
            for rows in sorted({rows for rows in (n_sat, 2 * n_sat, 4 * n_sat, 8 * n_sat, most) if rows <= most}):
                if clock.left() <= 0:
                    return found
                depths = sorted((gear.schedule.depth((i + 0.5) / rows) for i in range(rows)), reverse=True)
                given = inputs(task, rows)
                mixes = {"mixed": depths} | {str(d): [d] * rows for d in {*depths, task.model.depth}}
                took = {mix: bench.seconds(evaluation(task, given, of), 9) for mix, of in mixes.items()}
                full = took[str(task.model.depth)]
                ideal = sum(took[str(depth)] for depth in depths) / rows
                flops = loaded.subject.flops
                layers = 1 - sum(depths) / rows / task.model.depth
                row = {
                    **{"way": name, "gear": gear.name, "rows": rows, "n_sat": n_sat, "full_s": full},
                    **{"mixed_s": took["mixed"], "ideal_s": ideal, "over_ideal": took["mixed"] / ideal},
                    **{"layer_saving": layers, "time_saving": 1 - took["mixed"] / full},
                    "flop_saving": 1 - sum(flops[depth] for depth in depths) / rows / flops[task.model.depth],
                }
                row["of_layer_saving"] = row["time_saving"] / layers if layers else 1.0
                found.append(row)
                print(
                    f"    {name:<24} {gear.name:<9} {rows:>5} rows  saves {row['time_saving']:.3f} of time, "
                    f"{layers:.3f} of layers, {row['over_ideal']:.3f} of ideal"
                )
    return found


def ticking(task: GenerateTask, rows: int, guidance: float) -> Callable[[], Any]:
    """A function that ticks `rows` rows at full depth, for ever."""
    slots = list(range(rows))
    work = GenerateWork(
        model=task.info.name, labels=(0,) * rows, seeds=tuple(slots), steps=LONG, solver="ddim",
        guidance=guidance, gear="full",
    )  # fmt: skip
    task.admit(work, slots, slots)
    phase = torch.randint(LONG - 1, (rows,), generator=torch.Generator().manual_seed(0)).numpy()

    def tick() -> None:
        task.pool.done[slots] = phase
        task.step(slots)

    return tick


def replaying(bench: Bench, task: GenerateTask, rows: int, guidance: float) -> float | None:
    """Seconds of a whole tick's graph alone, replayed over the same rows; None where it has none."""
    key = rows, task.model.depth, guidance != 1.0, False
    if task.graphs is None or key not in task.graphs.ticks:
        return None
    return bench.seconds(task.graphs.ticks[key])


def again(run: Callable[[], Any], times: int) -> None:
    """Run so many times."""
    for _ in range(times):
        run()


def ticks(loaded: Loaded, clock: Clock) -> list[dict[str, Any]]:
    """Ticks a second of the task, and the share of a tick in which the device runs nothing, with what it runs."""
    bench, found = loaded.bench, []
    for rows, guidance in ((1, 1.0), (1, 2.0), (min(64, loaded.slots), 2.0)):
        for name, task in loaded.built().items():
            if clock.left() <= 0:
                return found
            tick = ticking(task, rows, guidance)
            again(tick, 5)
            times = 3 if bench.toy else 200
            walls = sorted(bench.wall(partial(again, tick, times)) / times for _ in range(5))
            seen = kernels(bench, tick, 2 if bench.toy else 20)
            wall, row = walls[2], {"way": name, "rows": rows, "guidance": guidance}
            replay_s = replaying(bench, task, rows, guidance)
            row |= {"tick_s": wall, "ticks_per_s": 1 / wall, "replay_s": replay_s, **seen}
            found.append(row | {"outside_kernels": 1 - (replay_s or seen["device_s"]) / wall})
            print(
                f"    {name:<24} {rows:>3} rows, guidance {guidance:g}: {1 / wall:8.1f} ticks / s, "
                f"{1e6 * seen['device_s']:.0f} us in {seen['kernels']:.0f} kernels, "
                f"{found[-1]['outside_kernels']:.1%} outside"
            )
    return found
