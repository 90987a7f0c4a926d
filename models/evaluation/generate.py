"""Evaluate a generator: cost, speed, class agreement and Frechet distance of every gear.

Same solver, steps, guidance, labels and noise for every gear. The distance is over features of the judge's
first member (after global pooling), against all test images; it is never called FID. The floor is the
distance of as many random training images, or of all where there are fewer.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.api import Gear, GenerateWork, Runtime
from models.backbones.resnet import ResNet
from models.evaluation.metrics import frechet, frechet_interval, moments
from models.tasks.classifier import load_members
from models.tasks.device import pick_device
from models.tasks.generate import GenerateTask
from models.tasks.generator import load
from models.training.data import Images, Splits
from models.training.members import pixels_of
from models.training.session import device_of

Floats = NDArray[np.float64]
POOL = {"cpu": 50, "cuda": 1000}  # images of a job
MANY = 20_000  # samples, whose interval takes fewer bootstraps


@dataclass(frozen=True)
class GearScore:
    """One gear's place on the cost/quality curve; ratios are relative to `full`."""

    gear: Gear
    layer_evals_per_image: float
    layer_evals_ratio: float
    class_accuracy: float
    frechet: float
    frechet_low: float
    frechet_high: float


@dataclass(frozen=True)
class Score:
    """What a judge says of a set of images; the distance with its bootstrap 95 % interval."""

    class_accuracy: float
    frechet: float
    frechet_low: float
    frechet_high: float


class Judge:
    """An ensemble that classifies samples, and the features of its first member over the test images; on a device."""

    def __init__(self, folder: Path, splits: Splits, device: str = "cpu") -> None:
        self.members = [member.to(pick_device(device)) for member in load_members(folder)]
        self.reference = moments(features(self.members[0], splits.test.images))

    def score(self, images: Images) -> Score:
        """Score images (N, H, W, C) that were asked for label i mod K."""
        found = features(self.members[0], images)
        labels = np.arange(len(images)) % self.members[0].config.classes
        right = agreement(self.members, images, labels)
        repeats = 200 if len(found) < MANY else 50  # each goes over all features, on the host
        interval = frechet_interval(found, self.reference, repeats)
        return Score(right, frechet(moments(found), self.reference), *interval)


def balanced_work(
    task: GenerateTask, gear: Gear, first: int, n: int, seed: int, steps: int | None = None
) -> GenerateWork:
    """`n` images from index `first` of a label-balanced set; image i always has seed + i and label i mod K.

    `steps`: the gear's own when None.
    """
    indices = range(first, first + n)
    return GenerateWork(
        model=task.info.name,
        labels=tuple(i % len(task.info.labels) for i in indices),
        seeds=tuple(seed + i for i in indices),
        steps=gear.steps if steps is None else steps,
        solver=gear.solver,
        guidance=gear.guidance,
        gear=gear.name,
        solver_options=gear.solver_options,
        guidance_interval=gear.guidance_interval,
    )


def run_work(task: GenerateTask, work: GenerateWork) -> tuple[Images, int]:
    """Run one job that fits the pool: images (n, H, W, C), and layer evaluations as counted."""
    slots = list(range(work.rows))
    left = dict(zip(slots, task.admit(work, slots, slots), strict=True))
    while left:
        waiting = task.step(list(left)).waiting
        left = {slot: n - (slot not in waiting) for slot, n in left.items() if n > 1 or slot in waiting}
    rows = task.collect(slots)
    return np.stack([row.pixels for row in rows]), sum(row.layer_evals for row in rows)


def draw(
    folder: Path, n: int, seed: int, *, bf16: bool = False, workers: int | None = None, device: str = "cpu"
) -> dict[str, tuple[Images, float]]:
    """`n` label-balanced images of every gear in pool-sized jobs, and layer evaluations per image.

    One single-threaded engine per core: cores that share every matmul wait for each other. On CUDA one engine, and jobs
    that fill it. `bf16` runs the networks in bfloat16, as they are served then; else in float32, whatever the model
    promises.
    """
    local, where = threading.local(), pick_device(device).type
    size, engines = POOL[where], workers or os.cpu_count() if where == "cpu" else 1

    def job(gear: Gear, first: int) -> tuple[Images, int]:
        if not hasattr(local, "task"):
            torch.set_num_threads(1)
            local.task = load(folder, size, device, Runtime(precision="bf16" if bf16 else "fp32"))
        return run_work(local.task, balanced_work(local.task, gear, first, min(size, n - first), seed))

    task = load(folder, 1, "cpu")
    threads, drawn = torch.get_num_threads(), {}
    try:
        with ThreadPoolExecutor(engines) as pool:
            for gear in task.info.gears:
                parts = []
                for part in pool.map(partial(job, gear), range(0, n, size)):
                    parts.append(part)
                    print(f"{gear.name}: {min(n, size * len(parts))}/{n}", file=sys.stderr, flush=True)
                drawn[gear.name] = np.concatenate([p for p, _ in parts]), sum(ran for _, ran in parts) / n
    finally:
        torch.set_num_threads(threads)
    return drawn


@torch.inference_mode()
def features(judge: ResNet, images: Images) -> Floats:
    """Pooled features (N, D) of uint8 images (N, H, W, C)."""
    device = device_of(judge)
    chunks = (pixels_of(images[i : i + 1000], device) for i in range(0, len(images), 1000))
    return np.concatenate([judge.features(judge.tap(x)).double().cpu().numpy() for x in chunks])


@torch.inference_mode()
def agreement(judges: list[ResNet], images: Images, labels: NDArray[np.int64]) -> float:
    """Share of images that the ensemble classifies as their label."""
    right, device = 0, device_of(judges[0])
    for i in range(0, len(images), 1000):
        x = pixels_of(images[i : i + 1000], device)
        mean = torch.stack([m(x).softmax(1) for m in judges]).mean(0)
        right += int((mean.argmax(1).cpu().numpy() == labels[i : i + 1000]).sum())
    return right / len(images)


def evaluate(
    folder: Path,
    judge_folder: Path,
    splits: Splits,
    n: int,
    seed: int,
    *,
    bf16: bool = False,
    workers: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score every gear with `n` images; also the floor with its interval."""
    judge = Judge(judge_folder, splits, device)
    random = np.random.default_rng(seed).choice(len(splits.train), min(n, len(splits.train)), replace=False)
    floor = judge.score(splits.train.images[random])
    drawn = draw(folder, n, seed, bf16=bf16, workers=workers, device=device)
    scores = []
    for gear in load(folder, 1, "cpu").info.gears:
        images, layer_evals = drawn[gear.name]
        score, ratio = judge.score(images), layer_evals / drawn["full"][1]
        scores.append(GearScore(gear, layer_evals, ratio, **vars(score)))
    return {"gears": scores, "floor": floor.frechet, "floor_interval": (floor.frechet_low, floor.frechet_high)}
