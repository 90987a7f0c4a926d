"""The sampler engine on a small random network: mixed batches give each row's own pixels."""

import random

import numpy as np
import pytest
import torch

from models.api import ExitSchedule, Gear, GenerateWork, ModelInfo, Task, planned_layer_evals
from models.backbones.dit import DiT, DiTConfig
from models.solvers.table import Process
from models.tasks.generate import GenerateTask

GEARS = (
    Gear("full", ExitSchedule((1.0,), (4,)), "dpmpp_2m", 6, 2.0),
    Gear("eco", ExitSchedule((0.3, 0.6, 1.0), (4, 3, 2)), "ddim", 5, 1.0),
)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=64, depth=4, heads=2, classes=3, time_features=32)).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    info = ModelInfo("toy", "generate", ("a", "b", "c"), (28, 28, 1), "w", depth=4, gears=GEARS, default_gear="eco")
    return GenerateTask(info, model, Process(clip=1.0), 16, torch.device("cpu"))


def work(**changes):
    base = {"model": "toy", "labels": (1,), "seeds": (5,), "steps": 6, "solver": "ddpm", "guidance": 2.0, "gear": "eco"}
    return GenerateWork(**(base | changes))


def run(task, job, slots=None):
    slots = slots or list(range(job.rows))
    for _ in range(task.admit(job, range(job.rows), slots)[0]):
        task.step(slots)
    return task.collect(slots)


def test_it_is_a_task(task):
    assert isinstance(task, Task)


def test_mixed_and_staggered_rows_give_the_pixels_of_each_row_alone(task):
    rng = random.Random(1)
    jobs = [
        work(
            labels=(rng.randrange(3),),
            seeds=(rng.randrange(2**53),),
            steps=rng.randint(1, 9),
            solver=rng.choice(["ddpm", "ddim", "dpmpp_2m"]),
            guidance=rng.choice([0.0, 1.0, 2.0, 3.5]),
            gear=rng.choice(["full", "eco"]),
        )
        for _ in range(32)
    ]
    alone = [run(task, job, [3])[0] for job in jobs]
    waiting, free, own, left, mixed = list(range(32)), list(range(16)), {}, {}, {}
    while waiting or own:
        while waiting and free and rng.random() < 0.7:
            slot, index = free.pop(rng.randrange(len(free))), waiting.pop(0)
            own[slot], left[slot] = index, task.admit(jobs[index], [0], [slot])[0]
        slots = rng.sample(list(own), len(own))
        if slots:
            task.step(slots)
        for slot in slots:
            left[slot] -= 1
            if not left[slot]:
                mixed[own.pop(slot)] = task.collect([slot])[0]
                free.append(slot)
    for i, one in enumerate(alone):
        assert np.array_equal(one.pixels, mixed[i].pixels), jobs[i]
        assert one.exit_depths == mixed[i].exit_depths


def test_receipt_counts_what_ran(task):
    job = work(labels=(0, 1), seeds=(1, 2), steps=5, guidance=2.0)
    rows = run(task, job)
    receipt = task.receipt(job, rows)
    assert receipt["exit_depths"] == [2, 2, 2, 3, 4]
    assert receipt["layer_evals"] == 2 * 2 * sum(receipt["exit_depths"])
    assert receipt["layer_evals"] == planned_layer_evals(GEARS[1], 5, 2.0, 2)
    assert receipt["layer_evals_full"] == 2 * 2 * 5 * 4
    assert receipt["compute_saved"] == pytest.approx(1 - 13 / 20)
    assert receipt["depth"] == 4


def test_step_reports_rows_evals_and_depths(task):
    job = work(labels=(0, 1), seeds=(1, 2), steps=4, guidance=1.0)
    task.admit(job, [0, 1], [0, 1])
    stats = task.step([0, 1])
    assert (stats.rows, stats.layer_evals, stats.layer_evals_full) == (2, 4, 8)
    assert stats.depth_counts == {(9, 2): 2}


def test_the_seed_decides(task):
    first, again, other = (run(task, work(seeds=(s,)))[0].pixels for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_reused_slot_forgets_its_history(task):
    job = work(solver="dpmpp_2m", steps=4)
    fresh = run(task, job, [7])[0].pixels
    task.admit(work(solver="dpmpp_2m", seeds=(99,), steps=8), [0], [7])
    task.step([7])
    assert np.array_equal(run(task, job, [7])[0].pixels, fresh)


def test_unguided_rows_skip_the_unconditional_network_row(task):
    task.admit(work(guidance=1.0), [0], [0])
    task.admit(work(guidance=3.0), [0], [1])
    stats = task.step([0, 1])
    assert stats.rows == 2
    assert stats.layer_evals_full == 3 * 4
