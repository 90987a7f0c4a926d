"""Rows of /generate that are saved, restored elsewhere and shown on their way: the pixels of an unbroken run."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from models.api import SolverOptions
from models.codecs.identity import Identity
from models.registry import SOLVERS
from models.solvers.process import from_config, solvers_for
from models.solvers.table import INDEX, assemble
from models.tasks.decoding import DecodeStage
from tests.models.test_generate_task import FINE_PRINT, PROCESS, Doubling, dit, make, run, work

PROCESSES = {
    "cosine": PROCESS,
    "learned": {
        "kind": "discrete",
        "timesteps": 1000,
        "betas": {"schedule": "linear", "start": 1e-4, "end": 0.02},
        "prediction": "epsilon",
        "learned_variance": True,
        "clip": 1.0,
    },
    "flow": {"kind": "flow"},
    "edm": {"kind": "edm", "prediction": "epsilon"},
}
COMPANY = work(seeds=(91, 92), labels=(0, 2), steps=40, solver="unipc")


@cache
def pair(process):
    """The same small model in two tasks, as two workers have it."""
    return [make(dit(image_size=8, width=32, learned_variance=process == "learned"), PROCESSES[process]) for _ in "ab"]


CASES = [(name, solver) for name, table in PROCESSES.items() for solver in solvers_for(from_config(table))]


@pytest.fixture(params=PROCESSES)
def tasks(request):
    return pair(request.param)


def jobs_of(task, solver):
    rng = random.Random(solver)
    prints = [*FINE_PRINT.get(solver, [{}]), {"grid": "exponential" if task.process.kind == "edm" else "linspace"}]
    if task.process.kind == "flow":
        prints = [options for options in prints if "churn" not in options]
    if getattr(task.process, "learned_variance", False) and solver == "ddpm":
        prints.append({"variance": "learned_range"})
    return [
        work(
            seeds=(rng.randrange(2**53),),
            labels=(rng.randrange(3),),
            steps=rng.randint(3, 5),
            solver=solver,
            solver_options=SolverOptions(**options),
            guidance=rng.choice([1.0, 3.0]),
            gear=rng.choice(["full", "eco"]),
        )
        for options in prints
    ]


def finish(task, left):
    """Step rows, slots to evaluations left, to their end; outputs by slot."""
    slots = list(left)
    while left := {slot: n for slot, n in left.items() if n}:
        waiting = task.step(list(left)).waiting
        left = {slot: n - (slot not in waiting) for slot, n in left.items()}
    return dict(zip(slots, task.collect(slots), strict=True))


def same(row, expected):
    assert np.array_equal(row.pixels, expected.pixels)
    for name in ("label", "seed", "exit_depths", "layer_evals", "layer_evals_full", "macs", "macs_full"):
        assert getattr(row, name) == getattr(expected, name)


def test_every_solver_has_a_case():
    assert {solver for _, solver in CASES} == set(SOLVERS)


@pytest.mark.parametrize(("process", "solver"), CASES)
def test_a_row_goes_on_elsewhere_from_any_evaluation(process, solver):
    """In another task, in other slots, in other company."""
    first, second = pair(process)
    jobs = jobs_of(first, solver)
    alone = [run(first, job)[0] for job in jobs]
    lengths = [len(row.exit_depths) for row in alone]
    for cut in range(1, max(lengths)):
        going = [i for i, n in enumerate(lengths) if n > cut]
        for i in going:
            first.admit(jobs[i], [0], [i])
        for _ in range(cut):
            first.step(going)
        second.admit(COMPANY, [0, 1], [0, 1])
        second.step([0, 1])
        left = {0: 3, 1: 3}
        for i, state in zip(going, first.save(going), strict=True):
            [left[15 - i]] = second.restore(jobs[i], [0], [15 - i], [state])
            assert left[15 - i] == lengths[i] - cut
        rows = finish(second, left)
        for i in going:
            same(rows[15 - i], alone[i])
            assert second.receipt(jobs[i], [rows[15 - i]]) == first.receipt(jobs[i], [alone[i]])


def test_a_mixed_batch_may_change_hands_at_every_tick(tasks):
    rng = random.Random(3)
    jobs = [job for solver in solvers_for(tasks[0].process) for job in jobs_of(tasks[0], solver)]
    jobs = rng.sample(jobs, min(12, len(jobs)))
    alone = [run(tasks[0], job)[0] for job in jobs]
    places = dict(enumerate(rng.sample(range(16), len(jobs))))
    left = {i: tasks[0].admit(job, [0], [places[i]])[0] for i, job in enumerate(jobs)}
    tick = 0
    while going := [i for i in left if left[i]]:
        here, there = tasks[tick % 2], tasks[1 - tick % 2]
        here.step([places[i] for i in going])
        states = here.save([places[i] for i in going])
        for i, slot, state in zip(going, rng.sample(range(16), len(going)), states, strict=True):
            [left[i]] = there.restore(jobs[i], [0], [slot], [state])
            places[i] = slot
            if not left[i]:
                same(there.collect([slot])[0], alone[i])
        tick += 1
    assert tick == max(len(row.exit_depths) for row in alone)


def test_images_of_one_job_are_saved_apart(tasks):
    first, second = tasks
    job = work(seeds=(3, 4, 5), labels=(0, 1, 2), steps=4, solver="euler")
    alone = run(first, job)
    first.admit(job, range(3), [4, 5, 6])
    first.step([4, 5, 6])
    states = first.save([6, 4])
    assert list(second.restore(job, [2, 0], [1, 2], states)) == [3, 3]
    rows = finish(second, {1: 3, 2: 3})
    same(rows[1], alone[2])
    same(rows[2], alone[0])


@pytest.mark.parametrize("codec", [Doubling, Identity])
def test_rows_wait_for_their_decode_again(codec):
    first, second = (
        make(model := dit(image_size=8, width=32), decoding=DecodeStage(codec(), 16, model.row_shape)) for _ in "ab"
    )
    job = work(steps=2, guidance=1.0)
    [alone] = run(first, job)
    for cut in (1, 2):
        first.admit(job, [0], [3])
        for _ in range(cut):
            first.step([3])
        left = second.restore(job, [0], [5], first.save([3]))
        assert left == [3 - cut]
        same(finish(second, {5: left[0]})[5], alone)


@pytest.mark.parametrize(
    ("solver", "done", "kept"),
    [
        ("ddim", 3, {"x"}),
        ("dpmpp_2m", 3, {"x", "h1"}),
        ("unipc", 3, {"x", "s", "h1", "h2"}),
        ("heun", 3, {"x", "s", "h1"}),
        ("heun", 4, {"x"}),
    ],
)
def test_only_what_the_solver_still_reads_is_kept(solver, done, kept):
    task = pair("cosine")[0]
    task.admit(work(solver=solver, steps=6), [0], [0])
    for _ in range(done):
        task.step([0])
    assert load(task.save([0])[0]).keys() - {"ran", "row", "weights"} == kept


def test_an_estimate_that_is_read_two_evaluations_on_is_kept_meanwhile():
    process = from_config(PROCESS)
    rows = [(process.at(u), row) for u, row in ((0.9, {}), (0.6, {}), (0.3, {"a_2": 1.0}))]
    assert assemble(process, rows, 1.0).reads[:, 2:].tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]


def test_a_row_without_an_evaluation_is_as_cheap_to_begin_again(tasks):
    tasks[0].admit(work(solver="euler"), [0], [2])
    assert tasks[0].save([2]) == [b""]


def broken(**changes):
    def change(state):
        tensors = load(state) | {name: value for name, value in changes.items() if value is not None}
        return save({name: value for name, value in tensors.items() if changes.get(name, value) is not None})

    return change


FLOATS = np.zeros((1, 8, 8), np.float32)
DAMAGED = {
    "cut short": (lambda state: state[:-7], "cannot be read"),
    "no state at all": (lambda state: b"\x80\x04K\x01.", "cannot be read"),
    "nothing ran": (broken(ran=np.zeros(0, np.int16)), "evaluations of 4"),
    "too much ran": (broken(ran=np.full(5, 2, np.int16)), "evaluations of 4"),
    "ran is missing": (broken(ran=None), "cannot be read"),
    "counts of another type": (broken(ran=np.ones(2, np.float32)), "evaluations of 4"),
    "no x": (broken(x=None), "needed after 2 evaluations"),
    "no history": (broken(h1=None), "needed after 2 evaluations"),
    "history that nobody reads": (broken(s=FLOATS), "needed after 2 evaluations"),
    "of another shape": (broken(x=np.zeros((1, 4, 4), np.float32)), "finite float32"),
    "of another type": (broken(x=np.zeros((1, 8, 8), np.float16)), "finite float32"),
    "not a number": (broken(x=FLOATS + np.nan), "finite float32"),
    "infinite": (broken(h1=FLOATS + np.inf), "finite float32"),
    "of another image": (broken(row=np.array([6, 1])), "row differs"),
    "of other weights": (broken(weights=np.frombuffer(b"v", np.uint8)), "weights differs"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_state_is_refused_and_nothing_is_placed(case):
    damage, words = DAMAGED[case]
    task, job = pair("cosine")[0], work(solver="dpmpp_2m", steps=4, guidance=1.0)
    [alone] = run(task, job)
    task.admit(job, [0], [0])
    for _ in range(2):
        task.step([0])
    [state] = task.save([0])
    with pytest.raises(ValueError, match=words):
        task.restore(
            work(seeds=(8, 5), labels=(1, 1), solver="dpmpp_2m", steps=4), [1, 1], [1, 0], [state, damage(state)]
        )
    same(finish(task, {0: 2})[0], alone)


def estimate(task, job, evaluations):
    """What the last of so many evaluations says of x0, by the process's own conversion."""
    seen, backend = [], task.backend

    class Recording:
        condition = backend.condition

        def __call__(self, x, condition, depths):
            output, ran = backend(x, condition, depths)
            seen.append((x, output))
            return output, ran

    task.backend = Recording()
    try:
        task.admit(job, [0], [0])
        for _ in range(evaluations):
            task.step([0])
    finally:
        task.backend = backend
    (x, o), row = seen[-1], task.trajectory(job.solver, job.steps, job.solver_options).coef[evaluations - 1]
    if task.process.kind == "flow":
        return x - row[INDEX["t"]] / task.process.timesteps * o
    o = o.chunk(2, 1)[0] if task.model.learned_variance else o
    return (row[INDEX["c_x"]] * x / row[INDEX["c_in"]] + row[INDEX["c_o"]] * o).clamp(-1, 1)


@pytest.mark.parametrize(("process", "solver"), CASES)
def test_a_preview_is_the_estimate_of_the_finished_image(process, solver):
    task, job = pair(process)[0], work(solver=solver, steps=4, guidance=1.0)
    evaluations = len(task.trajectory(solver, 4, SolverOptions()).u)
    for e in range(1, evaluations):
        wanted = ((estimate(task, job, e).clamp(-1, 1) + 1) * 127.5)[0, 0]
        [shown] = task.preview([0])
        assert (shown.shape, shown.dtype) == ((8, 8, 1), np.uint8)
        torch.testing.assert_close(torch.from_numpy(shown[..., 0]).float(), wanted.float(), atol=0.51, rtol=0)
    task.step([0])
    assert np.array_equal(task.preview([0])[0], task.collect([0])[0].pixels)


def test_there_is_no_preview_before_the_first_evaluation_here(tasks):
    first, second = tasks
    job = work(steps=4, solver="euler")
    first.admit(job, [0], [1])
    first.admit(job, [0], [2])
    assert first.preview([2]) == [None]
    first.step([2])
    shown = first.preview([1, 2])
    assert shown[0] is None
    assert shown[1].any()
    second.restore(job, [0], [2], first.save([2]))
    assert second.preview([2]) == [None]
    second.step([2])
    first.step([2])
    assert np.array_equal(second.preview([2])[0], first.preview([2])[0])


def test_latents_are_shown_where_decoding_runs_no_network():
    model = dit(image_size=8, width=32)
    for codec, shown in ((Doubling(), False), (Identity(), True)):
        task = make(model, decoding=DecodeStage(codec, 16, model.row_shape))
        task.admit(work(steps=2), [0], [0])
        task.step([0])
        assert (task.preview([0])[0] is not None) == shown
