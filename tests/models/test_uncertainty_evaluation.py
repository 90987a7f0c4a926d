"""The evaluation of uncertainty at toy size: it measures what is served; every table and picture is made."""

import json

import numpy as np
import pytest
from PIL import Image

from models.evaluation.classify import classify_images
from models.evaluation.served import run
from models.evaluation.uncertainty import at_points, cascades, coverages, quality, rankings, shift, study
from models.evaluation.uncertainty_report import draw, report
from models.store import read_json, write_json
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from models.tasks.contracts import write_calibration
from models.training.data import Split, Splits
from tests.models.classifiers import make_zoo
from tests.models.test_contract import split


def labelled_by(classifier, n, seed):
    """Images whose labels follow the ensemble nine times in ten, so that there is something to know."""
    images = split(n, seed)
    p = run(classifier, images).p["ensemble"]
    told = np.random.default_rng(seed).random(n) < 0.9
    return Split(images.images, np.where(told, p.argmax(1), images.labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def classifier(folder):
    return load_classifier(folder)


@pytest.fixture(scope="module")
def splits(classifier):
    return Splits(split(1, 0), *(labelled_by(classifier, n, n) for n in (300, 310, 320)))


@pytest.fixture(scope="module")
def found(classifier, splits):
    flat = Split(np.full((40, 28, 28, 1), 128, np.uint8), np.zeros(40, np.int64))
    return study(classifier, splits, flat)


def test_what_is_measured_is_what_is_served(folder, classifier, splits, found):
    """But for a row or two whose urgency is at the cascade's threshold, to rounding."""
    write_calibration(folder, classifier, found.calibration)
    task = load(folder, 64, "cpu")
    for method in found.methods:
        rows = classify_images(task, method, splits.test.images)
        p, decisions = np.array([row.probabilities for row in rows]), [row.decision for row in rows]
        same = np.isclose(p, found.test.p[method], rtol=1e-3).all(1)
        assert same.sum() >= len(rows) - (2 if method == "cascade" else 0)
        q = quality(found, method)
        assert q.accepted * len(rows) == pytest.approx(decisions.count("accept"), abs=2)
        assert q.abstained * len(rows) == pytest.approx(decisions.count("abstain"), abs=2)


def test_points_cost_what_their_members_do(found, classifier):
    points = at_points(found, classifier)
    assert [cost for _, cost, _ in points] == sorted(cost for _, cost, _ in points)
    bridge = classifier.costs()["bridge"]
    for terms, cost, outputs in points:
        escalated = (outputs.p["cascade"] != found.test.p["bridge"]).any(1).mean()
        assert cost == pytest.approx(bridge + 2 * escalated)
        assert terms.cost == pytest.approx(cost, abs=0.2)


def test_both_rules_meet_at_the_ends(found, classifier):
    for points in cascades(found, classifier):
        ends = {(p.rule, p.share): p.nll for p in points if p.share in (0.0, 1.0)}
        assert len(ends) == 4
        assert ends["threshold", 0.0] == ends["window", 0.0]
        assert ends["threshold", 1.0] == ends["window", 1.0]


def test_keys_of_members_are_ranked_where_members_ran(found):
    assert "mutual_information" in rankings(found, "ensemble")
    assert "energy" in rankings(found, "single")
    for method in ("single", "bridge", "cascade"):
        assert not {"mutual_information", "expected_entropy"} & set(rankings(found, method))
    for ranking in rankings(found, "bridge").values():
        assert 0.0 <= ranking.flagged <= 0.2
        assert len(ranking.corrupted) == 5


def test_energy_reads_the_sources_own_offset(found):
    np.testing.assert_allclose(
        found.test.scores("single")["energy"], -np.log(np.exp(found.test.logits[:, 0]).sum(1)), rtol=1e-9
    )


def test_coverage_is_near_nominal(found):
    for method in found.methods:
        for alpha, (shipped, mean) in coverages(found, method).items():
            assert mean.covered == pytest.approx(1 - alpha, abs=0.02)
            assert shipped.covered == pytest.approx(1 - alpha, abs=0.06)


def test_a_shift_counts_what_is_let_through(found):
    outputs = found.corrupted["noise", 5]
    s = shift(found, "bridge", outputs)
    assert s.accuracy == pytest.approx((outputs.p["bridge"].argmax(1) == outputs.labels).mean())
    assert 0 <= s.accepted <= 1


def test_every_table_and_picture_is_made(found, classifier, tmp_path):
    text = report(found, classifier)
    for heading in ("Answers as served", "Decisions", "Scores", "Corruptions", "Prediction sets", "Cascade"):
        assert f"### {heading}\n" in text
    for row in ("| cascade | 0.05 |", "| ensemble: mutual_information |", "| rotation 5 |", "(default)"):
        assert row in text
    assert "nan" not in text
    for path in draw(found, tmp_path / "plots"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_the_risk_that_was_asked_for_is_the_target(classifier, splits):
    strict, lax = (study(classifier, splits, None, risk) for risk in (0.05, 0.6))
    assert [s.contract("ensemble").thresholds.shown["value"] for s in (strict, lax)] == [0.05, 0.6]
    assert quality(strict, "ensemble").accepted < quality(lax, "ensemble").accepted
    assert "`coverage_at_risk` 60% with" in report(lax, classifier)


def test_an_ensemble_without_a_bridge_or_foreign_images_is_measured_too(tmp_path):
    folder = make_zoo(tmp_path)
    bridge = read_json(tmp_path / "toy-bridge" / "config.json")
    write_json(tmp_path / "toy-bridge" / "config.json", bridge | {"ensemble": "another"})
    classifier = load_classifier(folder)
    made = study(classifier, Splits(split(1, 0), split(60, 1), split(60, 2), split(60, 3)), None)
    text = report(made, classifier)
    assert made.methods == ["single", "ensemble"]
    assert "### Cascade" not in text
    write_calibration(folder, classifier, made.calibration)
    assert set(load(folder, 2, "cpu").info.decisions) == {"single", "ensemble"}
    assert json.loads((folder / "calibration.json").read_text())["cascade"] is None
