"""What shadow quality will show: how far each rung of the models that ship is from the best one, for the same work.

    python benchmarks/bench_shadow.py [--n N] [--seed S] [--label L] [--images N] [--data DIR] [--threads T]

/generate: N images of each gear, seeds from S, labels in turn, with the gear's own solver and steps, against those of
the best gear: root mean square of the pixels' difference, and what `single` of the classifier beside them says of both.
/classify: the first images of the test set in DIR (default: the 200 samples in the zoo) by each rung, against the
best. Mean, 95th percentile, standard error of the mean. The last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import finish, table
from models.api import ClassifyWork, GenerateWork, Task
from models.training.data import read
from service.config import Settings
from service.ladders import Work, moved, rungs_of
from service.worker.main import load_tasks
from service.worker.shadow import apart, judge_of, pixel_gap

SAMPLES = Path(__file__).resolve().parent.parent / "models" / "zoo" / "samples" / "fashion-test.png"
SIDE = 28


def answered(task: Task[Any, Any], work: Work) -> list[Any]:
    """Every row of `work`, in batches that fill the slots."""
    found: list[Any] = []
    for first in range(0, work.rows, task.capacity):
        indices = range(first, min(first + task.capacity, work.rows))
        slots = range(len(indices))
        left = dict(zip(slots, task.admit(work, indices, slots), strict=True))
        while moving := [slot for slot in slots if left[slot] > 0]:
            stats = task.step(moving)
            for slot in set(moving) - stats.waiting:
                left[slot] = 0 if slot in stats.finished else left[slot] - 1
        found += task.collect(slots)
    return found


def judged(judge: Task[Any, Any], images: Sequence[Any]) -> list[tuple[float, ...]]:
    """Probabilities of the classifier's source."""
    work = ClassifyWork(model=judge.info.name, images=tuple(map(bytes, images)), method="single", top_k=1)
    return [row.probabilities for row in answered(judge, work)]


def drawn(
    task: Task[Any, Any], judge: Task[Any, Any] | None, n: int, seed: int, label: int | None
) -> Iterator[tuple[str, list[Any]]]:
    """Each gear's images against the best gear's: gaps of every image, by kind."""
    rungs = rungs_of(task.info)
    gears = {gear.name: gear for gear in task.info.gears}
    best = gears[rungs[0]]
    work = GenerateWork(
        model=task.info.name,
        labels=tuple(i % len(task.info.labels) if label is None else label for i in range(n)),
        seeds=tuple(range(seed, seed + n)),
        steps=best.steps,
        solver=best.solver,
        guidance=best.guidance,
        gear=best.name,
        solver_options=best.solver_options,
        guidance_interval=best.guidance_interval,
    )
    pixels = {rung: [row.pixels for row in answered(task, moved(work, rung))] for rung in rungs}
    seen = {rung: judged(judge, images) if judge else [] for rung, images in pixels.items()}
    for rung in rungs[1:]:
        gaps = [{"pixels": pixel_gap(a, b)} for a, b in zip(pixels[rung], pixels[rungs[0]], strict=True)]
        if judge:
            both = zip(gaps, seen[rung], seen[rungs[0]], strict=True)
            gaps = [gap | apart(p, q) for gap, p, q in both]
        yield rung, gaps


def classified(task: Task[Any, Any], images: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Each rung's answers against the best one's."""
    rungs = rungs_of(task.info)
    work = ClassifyWork(model=task.info.name, images=tuple(map(bytes, images)), method="single", top_k=1)
    rows = {rung: answered(task, moved(replace(work), rung)) for rung in rungs}
    for rung in rungs[1:]:
        pairs = zip(rows[rung], rows[rungs[0]], strict=True)
        yield rung, [apart(a.probabilities, b.probabilities) for a, b in pairs]


def samples() -> list[Any]:
    """The tiles of the samples that ship."""
    sheet = np.asarray(Image.open(SAMPLES))
    height, width = (edge // SIDE for edge in sheet.shape)
    return list(sheet.reshape(height, SIDE, width, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE))


def main() -> None:
    """Measure, print, end in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="images of each gear")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--label", type=int, help="of all images of /generate; default: all labels in turn")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST, for /classify")
    parser.add_argument("--images", type=int, default=2000, help="test images of DIR")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = load_tasks(Settings())
    images = list(read(args.data, "test").images[: args.images]) if args.data else samples()
    lines = []
    for task in tasks:
        if task.info.task == "generate":
            found = drawn(task, judge_of(task.info, tasks), args.n, args.seed, args.label)
        else:
            found = classified(task, images)
        for rung, gaps in found:
            for kind in gaps[0]:
                values = np.array([gap[kind] for gap in gaps])
                error = values.std(ddof=1) / len(values) ** 0.5
                lines.append((task.info.name, rung, kind, len(values), values.mean(), np.quantile(values, 0.95), error))
    names = ("model", "rung", "kind", "n", "mean", "p95", "error")
    shown = [(*line[:4], *(f"{value:.4f}" for value in line[4:])) for line in lines]
    table(names, shown)
    finish("shadow", gaps=[dict(zip(names, map(str, line), strict=True)) for line in shown])


if __name__ == "__main__":
    main()
