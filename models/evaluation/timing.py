"""Time of one evaluation against batch and depth, and of gears side by side. One torch thread, set explicitly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.backbones.interface import Backbone
from models.evaluation.generate import balanced_work, run_work
from models.evaluation.turns import alternate
from models.tasks.generate import GenerateTask
from models.training.session import device_of

Floats = NDArray[np.float64]


@contextmanager
def one_thread() -> Iterator[None]:
    """A single torch thread, so that other processes on the machine disturb as little as possible."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ratio:
    """A time relative to `full`: median of the turns' ratios, and their least and greatest."""

    value: float
    low: float
    high: float


def time_gears(task: GenerateTask, repeats: int) -> dict[str, Ratio]:
    """Time of every gear relative to `full`: one job that fills the pool, turn by turn."""
    jobs = {gear.name: balanced_work(task, gear, 0, task.capacity, 0) for gear in task.info.gears}
    with one_thread():
        seconds = alternate({name: partial(run_work, task, work) for name, work in jobs.items()}, repeats)
    ratios = {name: values / seconds["full"] for name, values in seconds.items()}
    return {name: Ratio(float(np.median(r)), float(r.min()), float(r.max())) for name, r in ratios.items()}


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one network call, (len(rows), len(depths)), and the saturation count.

    A block on n rows takes about tau max(saturation, n): below `saturation` rows, fewer rows are no faster.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]
    saturation: float
    device: str = "cpu"


@torch.inference_mode()
def time_network(model: Backbone, rows: Sequence[int], depths: Sequence[int], repeats: int) -> Timing:
    """Time network calls where all of `rows` rows run `depths` blocks, head included; on the network's device."""
    device = device_of(model)

    def call(n: int, depth: int) -> Callable[[], Any]:
        x, y = torch.randn(n, *model.row_shape, device=device), torch.zeros(n, dtype=torch.int64, device=device)
        condition = model.condition(torch.full((n,), 0.5, device=device), y)
        return lambda: model(x, condition, [depth] * n)

    runs = {f"{n} {depth}": call(n, depth) for n in sorted(rows, reverse=True) for depth in depths}
    with one_thread():
        seconds = alternate(runs, repeats)
    table = np.array([[1000 * np.median(seconds[f"{n} {depth}"]) for depth in depths] for n in rows])
    found = tuple(map(tuple, table.tolist()))
    return Timing(tuple(rows), tuple(depths), found, saturation(rows, table[:, -1]), device.type)


def saturation(rows: Sequence[int], times: Floats) -> float:
    """The n_sat of tau max(n_sat, n) that fits `times` (len(rows),) best in relative squares; in [1, max(rows)]."""
    best, found = np.inf, 1.0
    for candidate in np.geomspace(1, max(rows), 200):
        shape = np.maximum(candidate, rows) / times
        tau = shape.sum() / np.square(shape).sum()
        error = float(np.square(tau * shape - 1).sum())
        if error < best - 1e-12:
            best, found = error, float(candidate)
    return found
