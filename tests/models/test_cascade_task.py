"""Method cascade in the task: calm rows answer as the cheap method, urgent ones as the ensemble, within max_cost."""

import itertools
import random

import numpy as np
import pytest

from models.api import UserError
from models.evaluation.classify import classify_images
from models.evaluation.served import calibrate
from models.evaluation.served import run as outputs
from models.evaluation.uncertainty import cost_of_rows
from models.store import StoreError, read_config, write_json
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from models.tasks.contracts import read_calibration, write_calibration
from models.training.data import Split
from tests.models.classifiers import IMAGES, flood, make_zoo, run, work, write_exits
from tests.models.test_contract import calibrated_zoo, split

COSTLY = 100.0


STARTS = {"bridge": {"evaluations": 1}, "steps": {"evaluations": 5}, "exits": {"exits": True}}


@pytest.fixture(scope="module", params=STARTS)
def folder(tmp_path_factory, request):
    return calibrated_zoo(tmp_path_factory.mktemp("zoo"), **STARTS[request.param])


@pytest.fixture(scope="module")
def task(folder):
    return load(folder, 12, "cpu")


@pytest.fixture(scope="module")
def cheap(folder):
    return load_classifier(folder).cheap


def points(task):
    return [point.cost for point in task.info.cascade]


def test_rows_answer_as_the_method_that_had_the_last_word(task, cheap):
    first, ensemble = (run(task, work(method, *IMAGES)) for method in (cheap, "ensemble"))
    rows = run(task, work("cascade", *IMAGES, max_cost=COSTLY))
    assert {row.escalated for row in rows} == {True, False}
    for row, calm, urgent in zip(rows, first, ensemble, strict=True):
        expected = urgent if row.escalated else calm
        assert row.probabilities == pytest.approx(expected.probabilities, rel=1e-4)
        assert set(row.uncertainty) == set(expected.uncertainty)
        assert row.exit == (0 if row.escalated else expected.exit)
        assert (row.exit > 0) == (cheap == "exits" and not row.escalated)
        assert row.uncertainty == pytest.approx(expected.uncertainty, rel=1e-3, abs=1e-5)
        assert row.decision in {"accept", "escalate", "abstain"}


def test_a_larger_max_cost_only_adds_escalations(task):
    seen = [[row.escalated for row in run(task, work("cascade", *IMAGES, max_cost=cost))] for cost in points(task)]
    assert not any(seen[0])
    assert any(seen[-1])
    for fewer, more in itertools.pairwise(seen):
        assert all(b or not a for a, b in zip(fewer, more, strict=True))


def test_the_receipt_counts_what_ran(task, folder, cheap):
    job = work("cascade", *IMAGES, max_cost=COSTLY)
    rows = run(task, job)
    receipt = task.receipt(job, rows)
    macs, plan = load_classifier(folder).macs, task.plans["cascade"].networks
    first = task.plans[cheap].networks
    own = [first[: first.index(f"exit-{row.exit}") + 1] if row.exit else first for row in rows]
    ran = [plan if row.escalated else names for row, names in zip(rows, own, strict=True)]
    assert receipt["image_costs"] == pytest.approx([sum(macs[n] for n in names) / macs["source"] for names in ran])
    assert receipt.get("exits") == ([row.exit for row in rows] if cheap == "exits" else None)
    assert receipt["escalated"] == [i for i, row in enumerate(rows) if row.escalated]
    assert receipt["cost_vs_single"] == pytest.approx(np.mean(receipt["image_costs"]))
    assert receipt["expected_cost"] == points(task)[-1]
    assert "escalated" not in task.receipt(work(cheap, IMAGES[0]), run(task, work(cheap, IMAGES[0])))


@pytest.mark.parametrize("folder", ["bridge", "steps"], indirect=True)
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


@pytest.mark.parametrize("folder", ["exits"], indirect=True)
def test_urgent_rows_run_every_stage_once_and_the_members_and_calm_ones_leave(task):
    seen, networks = [], task.networks
    task.networks = {n: lambda *x, n=n: seen.append((n, len(x[0]))) or networks[n](*x) for n in networks}
    try:
        rows = run(task, work("cascade", *IMAGES, max_cost=COSTLY))
    finally:
        task.networks = networks
    stays = [row.exit or 3 for row in rows]
    asked = sum(row.escalated for row in rows)
    assert 0 < asked < 12
    assert len(set(stays)) > 1
    stages = [(f"exit-{k}", sum(stay >= k for stay in stays)) for k in (1, 2, 3)]
    assert seen == [*stages, ("member-2", asked), ("member-3", asked)]


def test_urgent_is_what_the_cheap_answer_says(task, folder, cheap):
    """With exits that of the exit where the row would leave; the evaluation prices rows as their receipt does."""
    classifier = load_classifier(folder)
    router = read_calibration(folder, classifier).router
    p = np.array([row.probabilities for row in run(task, work(cheap, *IMAGES))])
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    evaluated = outputs(classifier, Split(images, np.zeros(12, np.int64)))
    for cost in points(task):
        job = work("cascade", *IMAGES, max_cost=cost)
        rows = run(task, job)
        urgent = router.urgency(p) >= router.pick(cost).least
        assert [row.escalated for row in rows] == urgent.tolist()
        paid = task.receipt(job, rows)["cost_vs_single"]
        assert cost_of_rows(classifier, evaluated, urgent) == pytest.approx(paid)


def test_a_calibration_of_another_start_is_refused(tmp_path):
    folder = calibrated_zoo(tmp_path, evaluations=1)
    write_exits(tmp_path)
    with pytest.raises(StoreError, match="was fitted on other weights"):
        load(folder, 2, "cpu")


def test_exits_need_no_bridge_for_a_cascade(tmp_path):
    folder = make_zoo(tmp_path)
    write_exits(tmp_path)
    config = read_config(tmp_path / "toy-bridge")
    write_json(tmp_path / "toy-bridge" / "config.json", config | {"ensemble": "another"})
    classifier = load_classifier(folder)
    write_calibration(folder, classifier, calibrate(classifier, *(outputs(classifier, split(60, n)) for n in (1, 2))))
    task = load(folder, 12, "cpu")
    assert "bridge" not in task.info.methods
    assert any(row.escalated for row in run(task, work("cascade", *IMAGES, max_cost=COSTLY)))


def test_cascades_at_every_cost_among_other_methods_answer_as_alone(task, cheap):
    rng = random.Random(1)
    options = [("cascade", {"max_cost": cost, "alpha": 0.2}) for cost in points(task)]
    options += [("single", {}), (cheap, {"alpha": 0.3}), ("ensemble", {})]
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
    ("method", "max_cost"), [("cascade", 0.1), ("bridge", 3.0), ("single", 1.0), ("ensemble", 9.0)]
)
def test_costs_that_cannot_be_kept_are_refused(task, method, max_cost):
    with pytest.raises(UserError) as refused:
        task.admit(work(method, IMAGES[0], max_cost=max_cost), [0], [0])
    assert refused.value.field == "max_cost"


def test_the_catalogue_prices_the_default_point(task, cheap):
    info = task.info
    assert info.methods["cascade"] in points(task)
    assert points(task)[0] == pytest.approx(info.methods[cheap])
    assert info.calls[cheap] <= info.calls["cascade"] <= len(task.plans["cascade"].networks)
    assert info.decisions["cascade"] in [point.decision for point in info.cascade]


def test_without_a_calibration_there_is_no_cascade(tmp_path):
    assert "cascade" not in load(make_zoo(tmp_path), 2, "cpu").info.methods
