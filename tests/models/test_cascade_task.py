"""Method cascade in the task: calm rows answer as the bridge, urgent ones as the ensemble, within max_cost."""

import itertools
import random

import numpy as np
import pytest

from models.api import UserError
from models.evaluation.classify import classify_images
from models.tasks.classify import load
from tests.models.classifiers import IMAGES, flood, make_zoo, run, work
from tests.models.test_classify_task import KEYS
from tests.models.test_contract import calibrated_zoo

COSTLY = 100.0


@pytest.fixture(scope="module", params=[1, 5])
def task(tmp_path_factory, request):
    return load(calibrated_zoo(tmp_path_factory.mktemp("zoo"), evaluations=request.param), 12, "cpu")


def points(task):
    return [point.cost for point in task.info.cascade]


def test_rows_answer_as_the_method_that_had_the_last_word(task):
    bridge, ensemble = (run(task, work(method, *IMAGES)) for method in ("bridge", "ensemble"))
    rows = run(task, work("cascade", *IMAGES, max_cost=COSTLY))
    assert {row.escalated for row in rows} == {True, False}
    for row, calm, urgent in zip(rows, bridge, ensemble, strict=True):
        expected = urgent if row.escalated else calm
        assert row.probabilities == pytest.approx(expected.probabilities, rel=1e-4)
        assert set(row.uncertainty) == KEYS["ensemble" if row.escalated else "bridge"]
        assert row.uncertainty == pytest.approx(expected.uncertainty, rel=1e-3, abs=1e-5)
        assert row.decision in {"accept", "escalate", "abstain"}


def test_a_larger_max_cost_only_adds_escalations(task):
    seen = [[row.escalated for row in run(task, work("cascade", *IMAGES, max_cost=cost))] for cost in points(task)]
    assert not any(seen[0])
    assert any(seen[-1])
    for fewer, more in itertools.pairwise(seen):
        assert all(b or not a for a, b in zip(fewer, more, strict=True))


def test_the_receipt_counts_what_ran(task):
    job = work("cascade", *IMAGES, max_cost=COSTLY)
    rows = run(task, job)
    receipt = task.receipt(job, rows)
    cheap, extra = task.info.methods["bridge"], task.info.methods["ensemble"] - 1
    assert receipt["image_costs"] == [cheap + extra * row.escalated for row in rows]
    assert receipt["escalated"] == [i for i, row in enumerate(rows) if row.escalated]
    assert receipt["cost_vs_single"] == pytest.approx(np.mean(receipt["image_costs"]))
    assert receipt["expected_cost"] == points(task)[-1]
    assert "escalated" not in task.receipt(work("bridge", IMAGES[0]), run(task, work("bridge", IMAGES[0])))


def test_calm_rows_stop_after_the_bridge_and_urgent_ones_after_the_last_member(task):
    job = work("cascade", *IMAGES, max_cost=COSTLY)
    slots = list(range(12))
    calls, finished, steps = task.admit(job, slots, slots), {}, task.info.calls["bridge"] - 1
    assert calls == [steps + 2] * 12
    for tick in range(steps):
        assert tick == 0 or not finished
        finished = task.step(slots).finished
    assert 0 < len(finished) < 12
    left = [slot for slot in slots if slot not in finished]
    assert [task.step(left).finished for _ in range(2)] == [frozenset()] * 2
    assert {slot for slot, row in enumerate(task.collect(slots)) if row.escalated} == set(left)


def test_cascades_at_every_cost_among_other_methods_answer_as_alone(task):
    rng = random.Random(1)
    options = [("cascade", {"max_cost": cost, "alpha": 0.2}) for cost in points(task)]
    options += [("single", {}), ("bridge", {"alpha": 0.3}), ("ensemble", {})]
    jobs = [work(method, image, **asked) for image in IMAGES for method, asked in [rng.choice(options)]]
    alone = [run(task, job, [4])[0] for job in jobs]
    mixed = flood(task, jobs, rng)
    for i, expected in enumerate(alone):
        assert mixed[i].probabilities == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6)
        assert (mixed[i].decision, mixed[i].prediction_set, mixed[i].escalated) == (
            expected.decision,
            expected.prediction_set,
            expected.escalated,
        )
        assert set(mixed[i].uncertainty) == set(expected.uncertainty)


def test_the_evaluation_runs_cascades_to_their_end(task):
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    rows = classify_images(task, "cascade", images)
    assert [row.escalated for row in rows] == [row.escalated for row in run(task, work("cascade", *IMAGES))]


@pytest.mark.parametrize(
    ("method", "max_cost"), [("cascade", 1.0), ("bridge", 3.0), ("single", 1.0), ("ensemble", 9.0)]
)
def test_costs_that_cannot_be_kept_are_refused(task, method, max_cost):
    with pytest.raises(UserError) as refused:
        task.admit(work(method, IMAGES[0], max_cost=max_cost), [0], [0])
    assert refused.value.field == "max_cost"


def test_the_catalogue_prices_the_default_point(task):
    info = task.info
    assert info.methods["cascade"] in points(task)
    assert points(task)[0] == pytest.approx(info.methods["bridge"])
    assert info.calls["bridge"] <= info.calls["cascade"] <= info.calls["bridge"] + 2
    assert info.decisions["cascade"] in [point.decision for point in info.cascade]


def test_without_a_calibration_there_is_no_cascade(tmp_path):
    assert "cascade" not in load(make_zoo(tmp_path), 2, "cpu").info.methods
