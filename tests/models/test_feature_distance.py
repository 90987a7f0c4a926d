"""feature_distance: a layer that is the Gaussians' density, tied to its source, in answers and decisions."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from models.backbones.distance import FeatureDistance
from models.evaluation.served import calibrate
from models.evaluation.served import run as run_split
from models.store import StoreError, read_config, write_json, write_model
from models.tasks.classifier import load_classifier, to_pixels
from models.tasks.classify import load
from models.tasks.contracts import Calibration, read_calibration, write_calibration
from models.training.data import Split
from models.training.distance import DistanceRecipe, fit_distance
from models.training.recipe import RecipeError
from models.uncertainty.contract import Answers, Contract, choose_foreign, choose_thresholds
from models.uncertainty.decision import DECISIONS, Target, Thresholds
from models.uncertainty.gaussians import Gaussians
from models.uncertainty.scores import entropy
from tests.models.classifiers import IMAGES, make_whole_zoo, make_zoo, run, work, write_distance, write_exits
from tests.models.test_contract import split

TARGET = Target("escalate_share", 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_whole_zoo(tmp_path_factory.mktemp("zoo"))
    write_distance(folder.parent)
    return folder


@pytest.fixture(scope="module")
def halves(folder):
    classifier = load_classifier(folder)
    return tuple(run_split(classifier, split(n, n)) for n in (300, 310))


@pytest.fixture(scope="module")
def calibration(folder, halves):
    classifier = load_classifier(folder)
    made = calibrate(classifier, *halves, TARGET, 0.1)
    write_calibration(folder, classifier, made)
    return made


# The layer


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.booleans())
def test_the_layer_is_the_density_of_the_nearest_class(seed, channels, fields, classes, shared):
    rng = np.random.default_rng(seed)
    size = channels * fields**2
    labels = np.arange(20 * size * classes) % classes
    mixing, means = rng.normal(size=(classes, size, size)), rng.normal(0.0, 3.0, (classes, size))
    features = np.einsum("nij,nj->ni", mixing[labels], rng.normal(size=(len(labels), size))) + means[labels]
    network = FeatureDistance.from_gaussians(Gaussians.fit(features, labels, shared), fields)
    taps = rng.normal(0.0, 3.0, (5, channels, 6, 6))
    seen = taps.reshape(5, channels, fields, 6 // fields, fields, 6 // fields).mean((3, 5)).reshape(5, size)
    groups = [features[labels == k] for k in range(classes)]
    covariances = [np.cov(g.T, bias=True).reshape(size, size) + 1e-6 * np.eye(size) for g in groups]
    if shared:
        covariances = [np.mean(covariances, axis=0)] * classes
    away = [seen - g.mean(0) for g in groups]
    expected = [
        0.5 * (np.einsum("ni,ij,nj->n", d, np.linalg.inv(c), d) + np.linalg.slogdet(c)[1])
        for d, c in zip(away, covariances, strict=True)
    ]
    found = network(torch.from_numpy(taps).float()).double().numpy()
    np.testing.assert_allclose(found, np.min(expected, axis=0), rtol=1e-2, atol=1e-2)


def test_the_nearest_class_wins():
    means, factors = np.array([[0.0], [10.0]]), np.ones((2, 1, 1))
    network = FeatureDistance.from_gaussians(Gaussians(means, factors, np.array([0.0, 2.0])), 1)
    taps = torch.tensor([0.0, 10.0, 4.0, -3.0]).reshape(4, 1, 1, 1)
    assert network(taps).tolist() == pytest.approx([0.0, 1.0, 8.0, 4.5])


def test_it_is_fitted_on_all_classes_and_enough_images(folder):
    source = load_classifier(folder).members[0]
    images = split(400, 3)
    network = fit_distance(DistanceRecipe("d", "toy", fields=1, covariance="shared"), source, images)
    assert network.whiten.weight.dtype == torch.float32
    blocks = network.whiten.weight.reshape(3, 8, 8)
    assert torch.equal(blocks[0], blocks[1])
    with torch.no_grad():
        pooled = source.tap(to_pixels(images.images)).mean((2, 3)).double().numpy()
        found = network(source.tap(to_pixels(images.images)))
    expected = Gaussians.fit(pooled, images.labels, True).distance(pooled)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(
        RecipeError,
        match="60 images that the source did not see, 17 of the rarest class, are too few for features of 32 numbers",
    ):
        fit_distance(DistanceRecipe("d", "toy"), source, Split(images.images[:60], images.labels[:60]))


@pytest.mark.parametrize(
    ("changes", "words"), [({"covariance": "none"}, "by class, shared"), ({"fields": 0}, "at least")]
)
def test_recipes_that_cannot_be_fitted_are_refused(changes, words):
    with pytest.raises(RecipeError, match=words):
        DistanceRecipe("d", "toy", **changes)


# The folder

REFUSED = {
    "another source": (
        {"source": {"file": "member-0.safetensors", "sha256": "0" * 64}},
        "re-run `offramp train distance`",
    ),
    "another tap": (lambda c: {"source": {**c["source"], "tap": "second"}}, "source.tap is 'second'"),
    "other pixels": (lambda c: {"source": {**c["source"], "network": {"width": 8}}}, "re-run `offramp train distance`"),
    "other fields": ({"fields": 3}, "does not fit the source"),
    "fields that are none": ({"fields": "two"}, "missing or malformed"),
    "negative fields": ({"fields": -1}, "does not fit the source"),
    "no source": ({"source": None}, "missing or malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_made_for_the_ensemble_is_refused(tmp_path, case):
    changes, words = REFUSED[case]
    folder, path = make_zoo(tmp_path, members=1), tmp_path / "toy-distance"
    write_distance(tmp_path)
    config = read_config(path)
    write_json(path / "config.json", config | (changes(config) if callable(changes) else changes))
    with pytest.raises(StoreError, match=words):
        load_classifier(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(tmp_path, value):
    folder, path = make_zoo(tmp_path, members=1), tmp_path / "toy-distance"
    write_distance(tmp_path)
    tensors = load_file(path / "distance.safetensors")
    tensors["half_log_det"][1] = value
    write_model(path, read_config(path), {"distance.safetensors": tensors}, keep_dtype=True)
    with pytest.raises(StoreError, match="half_log_det holds NaN or infinity"):
        load_classifier(folder)


def test_digests_cover_it(tmp_path):
    folder = make_zoo(tmp_path, members=1)
    seen = [load_classifier(folder)]
    for fields in (1, 2):
        write_distance(tmp_path, fields)
        seen.append(load_classifier(folder))
    assert len({c.fingerprint for c in seen}) == len({c.networks_digest for c in seen}) == 3
    write_calibration(folder, seen[1], Calibration())
    with pytest.raises(StoreError, match="fitted on other weights"):
        read_calibration(folder, seen[2])


# The answers


def test_every_method_that_runs_the_tap_knows_it(folder):
    """Alone, in a purified answer not at all; the value is the layer's on the source's tap."""
    classifier, task = load_classifier(folder), load(folder, 12, "cpu")
    with torch.no_grad():
        pixels = to_pixels(np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES]))
        expected = classifier.distance.network(classifier.members[0].tap(pixels)).tolist()
    assert classifier.measured() == {"single", "ensemble", "bridge", "bridges", "bridge_network", "exits", "cascade"}
    for method in task.info.methods:
        rows = run(task, work(method, *IMAGES))
        if method == "distilled":
            assert not any("feature_distance" in row.uncertainty for row in rows)
        else:
            assert [row.uncertainty["feature_distance"] for row in rows] == pytest.approx(expected, rel=1e-4)


def test_exits_that_do_not_see_the_tap_do_not_know_it(tmp_path):
    folder = make_zoo(tmp_path, members=2)
    write_distance(tmp_path)
    write_exits(tmp_path, thresholds=[None, 0.665], shares=[0.0, 0.8, 0.2])
    classifier, task = load_classifier(folder), load(folder, 12, "cpu")
    assert classifier.measured() == {"single", "ensemble", "bridge"}
    run(task, work("single", *IMAGES))
    assert not any("feature_distance" in row.uncertainty for row in run(task, work("exits", *IMAGES)))
    macs = classifier.macs
    assert classifier.exits.costs[0] == pytest.approx(macs["exit-2"] / macs["source"])


def test_exits_pay_for_it_once(folder):
    classifier = load_classifier(folder)
    macs, layer = classifier.macs, classifier.distance.network.whiten.weight.numel()
    costs = np.cumsum([macs[f"exit-{stage}"] for stage in (1, 2, 3)]) / macs["source"]
    assert classifier.exits.costs == pytest.approx(costs)
    without = dataclasses.replace(classifier, distance=None).macs
    assert macs["source"] - without["source"] == layer
    assert [macs[f"exit-{k}"] for k in (1, 2)] == [
        count + extra for count, extra in zip(bare_exits(folder, without["source"]), (layer, 0), strict=True)
    ]


def bare_exits(folder, source):
    """Multiply-accumulates of the first two exits of the same ensemble without a distance."""
    classifier = load_classifier(folder)
    for network in classifier.exits.networks:
        network.distance = None
    macs = classifier.macs
    return [macs[f"exit-{stage}"] for stage in (1, 2)]


# The decision

CODES = {name: code for code, name in enumerate(DECISIONS)}


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(-5, 5)), min_size=1, max_size=20))
def test_the_decision_is_the_worse_of_the_two(rows):
    scores, far = (np.array(column) for column in zip(*rows, strict=True))
    first, second = Thresholds("entropy", 1.0, 2.0), Thresholds("feature_distance", -1.0, 1.0)
    both, alone = Contract(first, None, second), Contract(first, None)
    found = both.decide({"entropy": scores, "feature_distance": far})
    assert [CODES[name] for name in found] == np.maximum(first.decide(scores), second.decide(far)).tolist()
    assert both.decide({"entropy": scores}) == alone.decide({"entropy": scores})
    assert alone.decide({"entropy": scores, "feature_distance": far}) == alone.decide({"entropy": scores})


def test_entropy_is_judged_on_familiar_rows_alone():
    rng = np.random.default_rng(0)
    p, labels = rng.dirichlet(np.ones(4), 2000), rng.integers(0, 4, 2000)
    familiar = rng.random(2000) < 0.8
    whole = Answers(p, labels, rng.random(2000), familiar)
    part = Answers(p[familiar], labels[familiar], whole.u[familiar])
    target = Target("coverage_at_risk", 0.8)
    found, expected = choose_thresholds(whole, target, 0.1), choose_thresholds(part, target, 0.1)
    assert (found.accept, found.abstain) == (expected.accept, expected.abstain)
    assert found.shown["coverage"] == pytest.approx(expected.shown["coverage"] * familiar.mean())
    assert {**found.shown, "coverage": 0} == {**expected.shown, "coverage": 0}


def test_shares_and_risk_shown_are_those_of_rows_that_pass_both(calibration, halves):
    selection = halves[0]
    foreign = calibration.foreign
    assert foreign == choose_foreign(selection.far, selection.p["single"].argmax(1) != selection.labels)
    assert (selection.far > foreign.accept).mean() == pytest.approx(0.05, abs=0.004)
    assert (selection.far > foreign.abstain).mean() == pytest.approx(0.01, abs=0.004)
    for method, contract in calibration.methods.items():
        taken = selection.decided(method, contract) == "accept"
        wrong = selection.p[method].argmax(1) != selection.labels
        assert taken.mean() == pytest.approx(contract.thresholds.shown["coverage"], abs=0.004), method
        assert wrong[taken].mean() == pytest.approx(contract.thresholds.shown["risk"], abs=0.01), method
        if method in selection.measured:
            assert not (taken & (selection.far > foreign.accept)).any()
        else:
            assert (taken & (selection.far > foreign.accept)).any()


def test_the_cascades_points_hold_for_familiar_rows(calibration, halves):
    selection = halves[0]
    for terms in calibration.router.points:
        outputs, _ = selection.cascaded(calibration.router, terms)
        taken = outputs.decided("cascade", terms.contract) == "accept"
        assert taken.mean() == pytest.approx(terms.contract.thresholds.shown["coverage"], abs=0.004)
        assert not (taken & (selection.far > calibration.foreign.accept)).any()


def test_it_is_kept_and_served(folder, calibration):
    kept = read_calibration(folder, load_classifier(folder))
    assert json.dumps(kept.to_json()) == json.dumps(calibration.to_json())
    terms = [contract.foreign for contract in kept.methods.values()]
    assert terms + [point.contract.foreign for point in kept.router.points] == [kept.foreign] * (
        len(kept.methods) + len(kept.router.points)
    )
    task = load(folder, 60, "cpu")
    rule = task.info.foreign
    assert (rule.score, rule.target, rule.value) == ("feature_distance", "escalate_share", 0.05)
    assert (rule.accept, rule.abstain) == (kept.foreign.accept, kept.foreign.abstain)
    grey = [bytes([level]) * 784 for level in (0, 128, 255)]
    for method in task.info.methods:
        rows = run(task, work(method, *IMAGES, *grey))
        limits = task.terms[0].contract.thresholds
        for row in rows:
            said = row.uncertainty
            codes = [
                int(rule.decide(np.array([said[rule.score]]))[0])
                for rule in (limits, kept.foreign)
                if rule.score in said
            ]
            assert row.decision == DECISIONS[max(codes)], method
            assert (len(codes) == 1) == (method == "distilled")


def test_without_it_there_is_no_rule(tmp_path):
    folder = make_zoo(tmp_path, members=2)
    classifier = load_classifier(folder)
    halves = [run_split(classifier, split(n, n)) for n in (60, 70)]
    made = calibrate(classifier, *halves, TARGET, 0.1)
    assert made.foreign is None
    write_calibration(folder, classifier, made)
    assert load(folder, 2, "cpu").info.foreign is None
    assert made.methods["single"].thresholds == choose_thresholds(halves[0].answers("single"), TARGET, 0.1)
    np.testing.assert_array_equal(
        halves[0].decided("single", made.methods["single"]),
        made.methods["single"].decide({"entropy": entropy(halves[0].p["single"])}),
    )
