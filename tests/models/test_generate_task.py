"""The sampler engine on small random networks: mixed batches give each row's own pixels."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from models.api import ExitSchedule, Gear, GenerateWork, ModelInfo, SolverOptions, Task, UserError, planned_layer_evals
from models.backbones.dit import DiT, DiTConfig
from models.backbones.uvit import UViT, UViTConfig
from models.backends.eager import build
from models.backends.interface import Setup
from models.codecs.interface import Codec
from models.solvers.process import from_config, solvers_for
from models.tasks.decoding import DecodeStage
from models.tasks.generate import GenerateTask

GEARS = (
    Gear("full", ExitSchedule((1.0,), (4,)), "dpmpp_2m", 6, 2.0),
    Gear("eco", ExitSchedule((0.3, 0.6, 1.0), (4, 3, 2)), "ddim", 5, 1.0),
)
PROCESS = {"prediction": "v", "clip": 1.0}
FINE_PRINT = {
    "ddim": [{}, {"eta": 0.5}],
    "ddpm": [{}, {"variance": "fixed_large"}],
    "dpmpp_2m": [{}, {"form": "heun"}, {"grid": "karras"}],
    "unipc": [{}, {"corrector": False}, {"grid": "logsnr"}],
    "heun": [{}, {"churn": 3.0, "grid": "karras"}],
}


class Doubling(Codec):
    """A codec of one to three channels and twice the size."""

    def image_shape(self, row_shape):
        return 3, 2 * row_shape[1], 2 * row_shape[2]

    def decode(self, states):
        return states.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1) * torch.ones(3, 1, 1)


def lively(model):
    """Random weights where the initialisation has zeros, so that every block matters."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def make(model, process=PROCESS, gears=GEARS, **more):
    process = from_config(process)
    info = ModelInfo(
        "toy", "generate", ("a", "b", "c"), (28, 28, 1), "w", depth=model.depth, gears=gears, default_gear="eco"
    )
    depths = tuple(sorted({d for gear in gears for d in gear.schedule.depths}))
    backend = build(Setup(model, depths, weights="w", rows=32, device=torch.device("cpu"), cache=Path("unused")))
    return GenerateTask(info, model, process, 16, torch.device("cpu"), backend=backend, **more)


def dit(**changes):
    torch.manual_seed(0)
    shape = {"image_size": 28, "width": 64, "depth": 4, "heads": 2, "classes": 3, "time_features": 32}
    return lively(DiT(DiTConfig(**(shape | changes))))


@pytest.fixture(scope="module")
def task():
    return make(dit())


def work(**changes):
    base = {"model": "toy", "labels": (1,), "seeds": (5,), "steps": 6, "solver": "ddpm", "guidance": 2.0, "gear": "eco"}
    return GenerateWork(**(base | changes))


def run(task, job, slots=None):
    slots = slots or list(range(job.rows))
    left = dict(zip(slots, task.admit(job, range(job.rows), slots), strict=True))
    while left:
        waiting = task.step(list(left)).waiting
        left = {slot: n - (slot not in waiting) for slot, n in left.items() if n > 1 or slot in waiting}
    return task.collect(slots)


def test_it_is_a_task(task):
    assert isinstance(task, Task)


def test_mixed_and_staggered_rows_give_the_pixels_of_each_row_alone(task):
    rng = random.Random(1)
    solvers = solvers_for(task.process)
    assert len(solvers) == 9
    jobs = []
    for i in range(36):
        solver = solvers[i % len(solvers)]
        jobs.append(
            work(
                labels=(rng.randrange(3),),
                seeds=(rng.randrange(2**53),),
                steps=rng.randint(2, 9),
                solver=solver,
                solver_options=SolverOptions(**rng.choice(FINE_PRINT.get(solver, [{}]))),
                guidance=rng.choice([0.0, 1.0, 2.0, 3.5]),
                guidance_interval=rng.choice([(0.0, 1.0), (0.2, 0.7)]),
                gear=rng.choice(["full", "eco"]),
            )
        )
    alone = [run(task, job, [3])[0] for job in jobs]
    waiting, free, own, left, mixed = list(range(len(jobs))), list(range(16)), {}, {}, {}
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
    assert "macs_saved" not in receipt
    assert "solver_options" not in receipt


def test_heun_evaluates_twice_but_in_its_last_step(task):
    job = work(solver="heun", steps=4, guidance=1.0, gear="full", solver_options=SolverOptions(grid="linspace"))
    receipt = task.receipt(job, run(task, job))
    assert receipt["exit_depths"] == [4] * 7
    assert receipt["layer_evals"] == planned_layer_evals(GEARS[0], 4, 1.0, 1, "heun")
    assert receipt["solver_options"] == {"grid": "linspace"}


def test_guidance_acts_in_its_interval_only(task):
    half = work(steps=4, solver="ddim", gear="full", guidance_interval=(0.0, 0.6))
    receipt = task.receipt(half, run(task, half))
    assert receipt["layer_evals"] == 4 * (1 + 1 + 2 + 2)
    assert receipt["layer_evals"] == planned_layer_evals(GEARS[0], 4, 2.0, 1, "ddim", (0.0, 0.6))
    never = run(task, work(solver="ddim", guidance_interval=(0.0, 0.0)))[0]
    assert np.array_equal(never.pixels, run(task, work(solver="ddim", guidance=1.0))[0].pixels)
    assert not np.array_equal(never.pixels, run(task, work(solver="ddim"))[0].pixels)


def test_options_that_make_no_sense_are_refused_by_field(task):
    with pytest.raises(UserError) as caught:
        task.admit(work(solver="ddpm", solver_options=SolverOptions(eta=0.5)), [0], [0])
    assert caught.value.field == "solver_options.eta"


def test_step_reports_rows_evals_and_depths(task):
    job = work(labels=(0, 1), seeds=(1, 2), steps=4, guidance=1.0)
    task.admit(job, [0, 1], [0, 1])
    stats = task.step([0, 1])
    assert (stats.rows, stats.layer_evals, stats.layer_evals_full) == (2, 4, 8)
    assert stats.depth_counts == {(9, 2): 2}
    assert (stats.decoded, stats.waiting) == (0, frozenset())


def test_a_row_that_shifts_runs_the_other_exits_from_its_next_evaluation_on(task):
    full, eco = work(gear="full", solver="ddim"), work(gear="eco", solver="ddim")
    task.admit(full, [0], [3])
    for done in range(6):
        if done == 2:
            task.shift(eco, [3])
        task.step([3])
    [row] = task.collect([3])
    schedule = GEARS[1].schedule
    times = task.trajectory("ddim", 6, eco.solver_options).u
    assert row.exit_depths == (4, 4, *(schedule.depth(float(u)) for u in times[2:]))
    assert row.exit_depths != (4,) * 6
    task.admit(full, [0], [5])
    task.shift(eco, [5])
    task.admit(eco, [0], [6])
    for _ in range(6):
        task.step([5, 6])
    shifted, named = task.collect([5, 6])
    assert (shifted.exit_depths, shifted.layer_evals) == (named.exit_depths, named.layer_evals)
    assert (shifted.pixels == named.pixels).all()


def test_a_receipt_says_what_earlier_attempts_ran_too(task):
    """A row that ran cheap, was saved, and ends elsewhere in the best gear."""
    ladder = {"ladder": ("full", "eco"), "solver": "ddim"}
    task.admit(work(gear="eco", **ladder), [0], [3])
    for _ in range(3):
        task.step([3])
    task.restore(work(gear="full", **ladder), [0], [4], task.save([3]))
    for _ in range(3):
        task.step([4])
    assert task.receipt(work(gear="full", **ladder), task.collect([4]))["gear"] == "eco"
    task.admit(work(gear="full", **ladder), [0], [5])
    for _ in range(6):
        task.step([5])
    assert task.receipt(work(gear="eco", **ladder), task.collect([5]))["gear"] == "full"


def test_the_seed_decides(task):
    first, again, other = (run(task, work(seeds=(s,)))[0].pixels for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_reused_slot_forgets_its_history(task):
    job = work(solver="unipc", steps=4)
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


def test_learned_variance_changes_ddpm_and_nothing_else():
    betas = {"schedule": "linear", "start": 1e-4, "end": 0.02}
    table = {"kind": "discrete", "timesteps": 1000, "betas": betas, "prediction": "epsilon"}
    task = make(dit(learned_variance=True, time_scale=1.0), table | {"learned_variance": True, "clip": 1.0})
    fixed, learned = SolverOptions(variance="fixed_small"), SolverOptions(variance="learned_range")
    a, b = (run(task, work(solver_options=options))[0].pixels for options in (fixed, learned))
    assert not np.array_equal(a, b)
    together = work(solver="ddim"), work(solver_options=learned), work(solver_options=fixed)
    alone = [run(task, job)[0].pixels for job in together]
    for slot, job in enumerate(together):
        task.admit(job, [0], [slot])
    for _ in range(6):
        task.step([0, 1, 2])
    for row, pixels in zip(task.collect([0, 1, 2]), alone, strict=True):
        assert np.array_equal(row.pixels, pixels)


def test_guidance_may_act_on_the_first_channels_only():
    model = dit(channels=4, image_size=8)
    both, first = make(model), make(model, guided_channels=3)
    job = work(solver="ddim", steps=1, gear="full")
    (
        run(both, job),
        run(first, job),
        run(unguided := make(model), work(solver="ddim", steps=1, gear="full", guidance=1.0)),
    )
    assert torch.equal(first.pool.x[0, :3], both.pool.x[0, :3])
    torch.testing.assert_close(first.pool.x[0, 3], unguided.pool.x[0, 3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both.pool.x[0, 3], unguided.pool.x[0, 3])


def test_a_model_without_null_label_refuses_guidance():
    task = make(dit(), guided_channels=0)
    run(task, work(guidance=1.0))
    with pytest.raises(UserError, match="guidance at 1") as caught:
        task.admit(work(guidance=2.0), [0], [0])
    assert caught.value.field == "guidance"


def test_planned_evaluations_are_those_of_every_solver(task):
    for solver in solvers_for(task.process):
        planned = planned_layer_evals(GEARS[0], 5, 1.0, 1, solver)
        assert planned == 4 * len(task.trajectory(solver, 5, SolverOptions()).u), solver


def test_dropped_decoder_blocks_are_counted_in_macs_too():
    torch.manual_seed(0)
    model = lively(UViT(UViTConfig(image_size=8, channels=1, patch=2, width=32, depth=5, heads=2, classes=3)))
    gears = (
        Gear("full", ExitSchedule((1.0,), (5,)), "ddim", 4, 1.0),
        Gear("eco", ExitSchedule((1.0,), (3,)), "ddim", 4, 1.0),
    )
    task = make(model, gears=gears, macs={3: 70, 5: 100})
    receipt = task.receipt(work(guidance=1.0), run(task, work(guidance=1.0)))
    assert receipt["compute_saved"] == pytest.approx(2 / 5)
    assert receipt["macs_saved"] == pytest.approx(0.3)
    halved = work(guidance=2.0, steps=4, solver="ddim", guidance_interval=(0.0, 0.6))
    receipt = task.receipt(halved, run(task, halved))
    assert receipt["guidance_interval"] == [0.0, 0.6]
    assert receipt["macs_saved"] == pytest.approx(0.3)


def latent_task():
    model = dit(image_size=8)
    return make(model, decoding=DecodeStage(Doubling(), 16, model.row_shape))


def test_decoding_is_one_more_stage_of_a_row():
    task = latent_task()
    job = work(steps=3)
    assert task.admit(job, [0], [2]) == [4]
    [row] = run(task, job)
    assert row.pixels.shape == (16, 16, 3)
    assert len(row.exit_depths) == 3
    plain = make(task.model)
    assert np.array_equal(row.pixels[::2, ::2, 0], run(plain, job)[0].pixels[..., 0])


def test_decoding_leaves_the_tick_to_the_rows_that_are_drawn():
    task = latent_task()
    short, long = work(labels=(0,) * 4, seeds=(1, 2, 3, 4), steps=2), work(steps=9)
    task.admit(short, range(4), [0, 1, 2, 3])
    task.admit(long, [0], [4])
    left = {0: 3, 1: 3, 2: 3, 3: 3, 4: 10}
    decoded = []
    while left:
        stats = task.step(list(left))
        assert stats.waiting <= {0, 1, 2, 3}
        decoded.append(stats.decoded)
        left = {slot: n - (slot not in stats.waiting) for slot, n in left.items() if n > 1 or slot in stats.waiting}
    assert decoded == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1]
    assert np.array_equal(task.collect([2])[0].pixels, run(task, work(labels=(0,), seeds=(3,), steps=2))[0].pixels)


def test_a_slot_given_away_is_not_decoded_for_its_old_row():
    task = latent_task()
    task.admit(work(steps=1), [0], [0])
    task.step([0])
    task.admit(work(steps=2), [0], [0])
    assert task.step([0]).decoded == 0
