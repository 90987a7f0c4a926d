"""Measured time of every method as it is served: from admission to the answer, by backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from models.api import Runtime
from models.evaluation.classify import classify_images
from models.evaluation.report import markdown
from models.evaluation.turns import measure_times
from models.tasks.classify import ClassifyTask, load
from models.tasks.contracts import Calibration
from models.training.data import Images

BACKENDS = ("eager", "onnx")
BATCHES = (32, 1)
TIMED = {32: 256, 1: 64}  # images that the time of a batch averages over
REPEATS = 15
Times = dict[tuple[str, str, int], float]


def time_served(
    folder: Path,
    calibration: Calibration,
    images: Images,
    backends: Iterable[str] = BACKENDS,
    batches: Iterable[int] = BATCHES,
    device: str = "cpu",
) -> Times:
    """Seconds a batch by method, backend and batch, the mean over the first `TIMED` images (N, H, W, C); all in turns,
    the fastest of each. A backend that cannot work here is left out. One thread, as a worker on two cores has. On CUDA
    the first backend only.
    """
    threads = torch.get_num_threads()
    taken = {n: [images[i : i + n] for i in range(0, min(TIMED[n], len(images)), n)] for n in batches}
    torch.set_num_threads(1)
    try:
        with TemporaryDirectory() as cache:
            names = list(backends) if device == "cpu" else list(backends)[:1]
            tasks = {
                name: load(folder, max(BATCHES), device, Runtime(name, cache=cache), calibration) for name in names
            }
            runs: dict[tuple[str, str, int], Callable[[], Any]] = {
                (method, name, batch): partial(classify_batches, task, method, taken[batch])
                for batch in taken
                for name, task in tasks.items()
                if task.info.backend.startswith(name)
                for method in task.info.methods
            }
            found = measure_times({str(key): run for key, run in runs.items()}, REPEATS)
            return {key: found[str(key)] / len(taken[key[2]]) for key in runs}
    finally:
        torch.set_num_threads(threads)


def classify_batches(task: ClassifyTask, method: str, batches: Iterable[Images]) -> None:
    """One after the other."""
    for images in batches:
        classify_images(task, method, images)


def times_table(found: Times, on: str = "one torch thread") -> str:
    """Each method relative to `single` on the same backend and batch; `single` in milliseconds."""
    columns = [(name, batch) for name in BACKENDS for batch in BATCHES if ("single", name, batch) in found]
    rows = []
    for method in dict.fromkeys(method for method, _, _ in found):
        own = [found[method, name, batch] / found["single", name, batch] for name, batch in columns]
        rows.append([method, *(f"{value:.2f}" for value in own)])
    base = ", ".join(f"{1e3 * found['single', name, batch]:.2f} ms {name} at {batch}" for name, batch in columns)
    note = (
        f"From admission to the answer, {on}, the fastest of {REPEATS} turns, relative to `single` on the "
        f"same backend and batch, itself {base}. Methods that stop early depend on the images: these are test images, "
        f"{TIMED[32]} of them in batches of 32, {TIMED[1]} one by one."
    )
    header = ["method", *(f"{name}, batch {batch}" for name, batch in columns)]
    return f"### Time as served\n\n{markdown(header, rows)}\n\n{note}"


def ratios(found: Times, backend: str = "eager", batch: int = BATCHES[0]) -> dict[str, float]:
    """Each method's time relative to `single`."""
    base = found["single", backend, batch]
    return {m: float(np.round(value / base, 2)) for (m, b, n), value in found.items() if (b, n) == (backend, batch)}
