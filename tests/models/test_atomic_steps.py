"""A step that raises has moved no row: whichever of its calls fails, stepping again gives an undisturbed run's bits."""

import dataclasses
import itertools

import numpy as np
import pytest

from models.evaluation.served import calibrate
from models.evaluation.served import run as run_split
from models.registry import METHODS, SOLVERS, TASKS
from models.tasks.classifier import load_classifier
from models.tasks.classify import ClassifyTask, load
from models.tasks.contracts import write_calibration
from models.tasks.decoding import DecodeStage
from models.uncertainty.decision import Target
from tests.models.classifiers import IMAGES, make_whole_zoo
from tests.models.classifiers import work as classify_work
from tests.models.purifiers import write_purifier
from tests.models.test_generate_task import Doubling, dit, make
from tests.models.test_generate_task import work as generate_work
from tests.models.test_methods import split


class Trouble(RuntimeError):
    """What a call that fails raises."""


class Fuse:
    """Wraps calls; the one that is number `left` from now fails, before or after it did its work."""

    def __init__(self):
        self.left, self.late, self.blown = -1, False, 0

    def __call__(self, call):
        def guarded(*given):
            self.left -= 1
            if self.left != -1:
                return call(*given)
            if self.late:
                call(*given)
            self.blown += 1
            raise Trouble

        return guarded


def where(task):
    """How far every row is."""
    if isinstance(task, ClassifyTask):
        return task.done[: task.capacity].tolist(), {slot: image.done for slot, image in task.stage.images.items()}
    return task.pool.done.tolist(), task.decoding and task.decoding.choose(range(task.capacity), 8 * task.capacity)


def stubborn(task, fuse):
    """A `step` that fails at each of its calls in turn, before and after its work, and then succeeds."""

    def step(slots):
        before = where(task)
        for n in itertools.count():
            fuse.left, fuse.late = n, False
            try:
                stats = task.step(slots)
            except Trouble:
                fuse.left, fuse.late = n, True
                with pytest.raises(Trouble):
                    task.step(slots)
                assert where(task) == before
            else:
                fuse.left = -1
                return stats

    return step


def halving(task, fuse):
    """A `step` that fails once, and then goes on half by half."""

    def step(slots):
        fuse.left, fuse.late = 0, False
        with pytest.raises(Trouble):
            task.step(slots)
        halves = [part for part in (slots[: len(slots) // 2], slots[len(slots) // 2 :]) if part]
        stats = [task.step(part) for part in halves]
        finished = frozenset().union(*(one.finished for one in stats))
        waiting = frozenset().union(*(one.waiting for one in stats))
        return dataclasses.replace(stats[0], finished=finished, waiting=waiting)

    return step


def flow(task, jobs, step):
    """One row a job, the i-th in slot i, two more a tick; outputs by job."""
    left, outputs, coming = {}, {}, list(enumerate(jobs))
    while left or coming:
        for slot, job in coming[:2]:
            [left[slot]] = task.admit(job, [0], [slot])
        coming = coming[2:]
        if moving := [slot for slot, n in left.items() if n]:
            stats = step(moving)
            for slot in moving:
                left[slot] = 0 if slot in stats.finished else left[slot] - (slot not in stats.waiting)
        for slot in [slot for slot, n in left.items() if not n]:
            [outputs[slot]] = task.collect([slot])
            del left[slot]
    return [outputs[i] for i in range(len(jobs))]


def test_every_task_is_here_or_has_a_test_of_its_own():
    assert set(TASKS) == {"generate", "classify"} | {"drill"}, "drill: test_drill.py"


# /generate


class Guarded:
    """A backend whose calls may fail."""

    def __init__(self, backend, fuse):
        self.run, self.condition = fuse(backend), fuse(backend.condition)

    def __call__(self, *given):
        return self.run(*given)


@pytest.fixture(params=[False, True], ids=["pixels", "latents"])
def generator(request):
    model = dit(image_size=8, width=32)
    return make(model, decoding=DecodeStage(Doubling(), 16, model.row_shape) if request.param else None)


DRAWN = [
    generate_work(solver=solver, steps=2 + i % 4, seeds=(i,), guidance=(1.0, 2.0)[i % 2], gear=("eco", "full")[i % 2])
    for i, solver in enumerate(SOLVERS)
]


@pytest.mark.parametrize("way", [stubborn, halving])
def test_rows_that_are_drawn_stay_where_they_were(generator, way):
    expected, fuse = flow(generator, DRAWN, generator.step), Fuse()
    generator.backend = Guarded(generator.backend, fuse)
    if generator.decoding:
        generator.decoding.codec.decode = fuse(generator.decoding.codec.decode)
    for row, wanted in zip(flow(generator, DRAWN, way(generator, fuse)), expected, strict=True):
        assert np.array_equal(row.pixels, wanted.pixels)
        assert (row.exit_depths, row.layer_evals) == (wanted.exit_depths, wanted.layer_evals)
    assert fuse.blown >= 8


# /classify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_whole_zoo(tmp_path_factory.mktemp("zoo"))
    write_purifier(folder.parent)
    classifier = load_classifier(folder)
    halves = run_split(classifier, split(60, 1)), run_split(classifier, split(80, 2))
    write_calibration(folder, classifier, calibrate(classifier, *halves, Target("escalate_share", 0.3), 0.1))
    return folder


ASKED = [
    *(classify_work(method, image) for method, image in zip(METHODS, itertools.cycle(IMAGES), strict=False)),
    *(
        classify_work(method, IMAGES[9], purify=draws)
        for method, draws in (("bridge", 2), ("single", 16), ("bridges", 9))
    ),
    classify_work("cascade", IMAGES[10], max_cost=100.0),
    classify_work("bridge", IMAGES[11], alpha=0.2),
]


def guard(task, fuse):
    """Networks, denoiser and the methods' own decisions may fail."""
    task.networks = {name: fuse(network) for name, network in task.networks.items()}
    purifier = task.stage.purifier
    object.__setattr__(purifier, "step", fuse(purifier.step))
    for method in task.methods.values():
        method.finished = fuse(method.finished)


@pytest.mark.parametrize("way", [stubborn, halving])
def test_rows_that_are_classified_stay_where_they_were(folder, way):
    expected = flow(plain := load(folder, 16, "cpu"), ASKED, plain.step)
    task, fuse = load(folder, 16, "cpu"), Fuse()
    guard(task, fuse)
    exact = way is stubborn
    for row, wanted in zip(flow(task, ASKED, way(task, fuse)), expected, strict=True):
        assert row.probabilities == (wanted.probabilities if exact else pytest.approx(wanted.probabilities, abs=1e-5))
        assert (row.exit, row.escalated, row.decision) == (wanted.exit, wanted.escalated, wanted.decision)
    assert fuse.blown >= 8
