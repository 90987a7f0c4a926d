"""Contracts: fitted on validation, kept with the model, tied to its weights; decisions and sets as served."""

import json
import math

import numpy as np
import pytest
import torch

from models.evaluation.served import calibrate, run
from models.store import StoreError, read_config, read_json, write_json, write_model
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from models.tasks.contracts import NAME, read_calibration, write_calibration
from models.training.data import Split
from models.uncertainty.conformal import Rule, measure
from models.uncertainty.contract import Answers, Contract, choose_rule, decision_rule, listed, set_rule
from models.uncertainty.decision import Target, Thresholds
from tests.models.classifiers import IMAGES, make_zoo, work, write_exits
from tests.models.classifiers import run as answer


def split(n, seed):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8), rng.integers(0, 3, n))


def calibrated_zoo(root, exits=False, **zoo):
    folder = make_zoo(root, **zoo)
    if exits:
        write_exits(root)
    classifier = load_classifier(folder)
    halves = run(classifier, split(60, 1)), run(classifier, split(80, 2))
    write_calibration(folder, classifier, calibrate(classifier, *halves, Target("escalate_share", 0.3), 0.1))
    return folder


def answers(n, seed, k=5):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(k, 0.3), n)
    labels = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    return Answers(p, labels, rng.random(n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return calibrated_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def task(folder):
    return load(folder, 12, "cpu")


@pytest.fixture(scope="module")
def kept(folder):
    return read_calibration(folder, load_classifier(folder))


@pytest.fixture(scope="module")
def contract():
    return Contract.fit(answers(4000, 0), answers(4000, 1), Rule(penalty=0.05, free=2), Target("escalate_share", 0.4))


def test_a_contract_survives_json(contract):
    again = Contract.from_json(json.loads(json.dumps(contract.to_json())))
    assert again.thresholds == contract.thresholds
    assert again.conformal.rule == contract.conformal.rule
    np.testing.assert_array_equal(again.conformal.scores, contract.conformal.scores)


def test_decisions_and_sets_keep_their_promise_on_fresh_rows(contract):
    fresh = answers(20_000, 2)
    names = contract.decide({"entropy": -(fresh.p * np.log(np.maximum(fresh.p, 1e-12))).sum(1)})
    assert np.mean([name == "accept" for name in names]) == pytest.approx(0.6, abs=0.02)
    assert np.mean([name == "abstain" for name in names]) == pytest.approx(0.01, abs=0.005)
    taken = np.array([name == "accept" for name in names])
    assert fresh.errors[taken].mean() < 0.8 * fresh.errors.mean()
    for alpha in (0.05, 0.3):
        sets = contract.sets(fresh.p, np.full(20_000, alpha), fresh.u)
        assert np.mean([y in s for y, s in zip(fresh.labels, sets, strict=True)]) == pytest.approx(1 - alpha, abs=0.015)


def test_sets_are_listed_likeliest_first():
    assert listed(np.array([[True, False, True], [False, False, False]]), np.array([[0.2, 0.1, 0.7], [1, 0, 0]])) == [
        (2, 0),
        (),
    ]


def test_the_chosen_rule_has_the_smallest_sets():
    made, rules = answers(2000, 3), (Rule(), Rule(penalty=1.0, free=5))
    rule = choose_rule(made, rules)
    own = {
        r: sum(
            measure(Contract.fit(made, made, r).conformal.sets(made.p, a, made.u), made.labels).size
            for a in (0.05, 0.1)
        )
        for r in rules
    }
    assert own[rule] == min(own.values())


def test_the_catalogue_shows_thresholds_without_infinities():
    shown = {
        "target": "coverage_at_risk",
        "value": 0.1,
        "confidence": 0.9,
        "coverage": 0.0,
        "risk": None,
        "bound": None,
    }
    rule = decision_rule(Thresholds("margin", -math.inf, -0.25, {**shown, "rows": 10}))
    assert (rule.accept, rule.abstain, rule.score, rule.risk) == (None, 0.25, "margin", None)
    assert decision_rule(Thresholds("entropy", 0.5, math.inf, shown)).abstain is None


def test_what_is_served_is_what_was_measured(folder, task, kept):
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    out = run(load_classifier(folder), Split(images, np.zeros(12, np.int64)))
    for method, contract in kept.methods.items():
        rows = answer(task, work(method, *IMAGES, alpha=0.4))
        np.testing.assert_allclose([row.probabilities for row in rows], out.p[method], rtol=1e-4)
        assert [row.prediction_set for row in rows] == contract.sets(out.p[method], np.full(12, 0.4), out.u)
        assert [row.decision for row in rows] == contract.decide({"entropy": out.scores(method)["entropy"]})


def test_a_set_depends_on_its_image_alone(task):
    together = answer(task, work("bridge", *IMAGES, alpha=0.3))
    alone = [answer(task, work("bridge", image, alpha=0.3), [7])[0] for image in IMAGES]
    assert [row.prediction_set for row in together] == [row.prediction_set for row in alone]
    assert len({row.prediction_set for row in together}) > 1
    assert answer(task, work("bridge", IMAGES[0]))[0].prediction_set is None


def test_sets_grow_as_alpha_falls(task):
    small, large = (answer(task, work("single", *IMAGES, alpha=alpha)) for alpha in (0.6, 0.1))
    assert all(set(a.prediction_set) <= set(b.prediction_set) for a, b in zip(small, large, strict=True))
    assert sorted(answer(task, work("single", IMAGES[0], alpha=1e-6))[0].prediction_set) == [0, 1, 2]


def test_the_catalogue_says_what_is_promised(task, kept):
    assert set(task.info.decisions) == set(task.info.sets) == set(task.info.methods)
    rule = task.info.decisions["bridge"]
    assert (rule.score, rule.target, rule.value) == ("entropy", "escalate_share", 0.3)
    assert rule.accept < rule.abstain
    assert task.info.sets["bridge"] == set_rule(kept.methods["bridge"].conformal)
    assert task.info.sets["bridge"].rows == 80


def test_without_a_calibration_there_are_no_promises(tmp_path):
    bare = load(make_zoo(tmp_path), 4, "cpu")
    assert bare.info.decisions == bare.info.sets == {}
    assert answer(bare, work("single", IMAGES[0]))[0].decision is None


@pytest.mark.parametrize("changed", ["temperature", "weights", "bridge"])
def test_a_calibration_of_something_else_is_refused(tmp_path, changed):
    folder = calibrated_zoo(tmp_path)
    config, bridge = read_config(folder), read_config(tmp_path / "toy-bridge")
    if changed == "temperature":
        write_json(folder / "config.json", config | {"temperatures": {"single": 1.0, "ensemble": 1.0}})
    elif changed == "weights":
        config["files"]["member-2.safetensors"] = "0" * 64
        write_json(folder / "config.json", config)
    else:
        serve = {"bridge": bridge["serve"]["bridge"] | {"temperature": 3.0}}
        write_json(tmp_path / "toy-bridge" / "config.json", bridge | {"serve": serve})
    with pytest.raises(StoreError, match=r"other weights or temperatures.*eval classify --write|does not match"):
        load(folder, 4, "cpu")


def test_a_malformed_calibration_is_named(tmp_path):
    folder = calibrated_zoo(tmp_path)
    found = read_json(folder / NAME)
    del found["methods"]["single"]["decision"]["accept"]
    write_json(folder / NAME, found)
    with pytest.raises(StoreError, match=r"calibration\.json cannot be read"):
        read_calibration(folder, load_classifier(folder))


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    folder = make_zoo(tmp_path)
    config = read_config(folder)
    member = load_classifier(folder).members[0]
    member.fc.weight[0, 0] = torch.nan
    names = config["members"]
    write_model(tmp_path / "bad", config | {"name": "bad", "members": names[:1]}, {names[0]: member.state_dict()})
    with pytest.raises(StoreError, match=r"member-0.safetensors: fc.weight holds NaN"):
        load(tmp_path / "bad", 2, "cpu")
