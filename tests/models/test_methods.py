"""Every classify method keeps the contract; what several bridges do to the source; folders that cannot be served."""

import dataclasses
import math
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from models.bridge.mixture import FLOOR, mixture
from models.evaluation.served import calibrate
from models.evaluation.served import run as run_split
from models.registry import METHODS
from models.store import StoreError, read_config, read_json, write_json
from models.tasks.classifier import load_classifier
from models.tasks.classify import PATIENCE, load
from models.tasks.contracts import write_calibration
from models.tasks.parts import parts
from models.training.data import Split
from models.uncertainty.decision import Target
from tests.models import classifiers, method_contract
from tests.models.classifiers import (
    IMAGES,
    LIGHT,
    SHAPE,
    make_whole_zoo,
    make_zoo,
    run,
    served,
    work,
    write_bridges,
    write_distance,
    write_student,
)
from tests.models.purifiers import write_purifier


def split(n, seed):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8), rng.integers(0, 3, n))


def calibrated_whole_zoo(root, distance=False):
    """`toy` with all that any method needs, a purifier and a calibration; a feature distance where asked."""
    folder = make_whole_zoo(root)
    write_purifier(root)
    if distance:
        write_distance(root)
    classifier = load_classifier(folder)
    halves = run_split(classifier, split(60, 1)), run_split(classifier, split(80, 2))
    write_calibration(folder, classifier, calibrate(classifier, *halves, Target("escalate_share", 0.3), 0.1))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["without a distance", "with a distance"])
def folder(tmp_path_factory, request):
    return calibrated_whole_zoo(tmp_path_factory.mktemp("zoo"), request.param)


@pytest.fixture(scope="module")
def task(folder):
    return load(folder, 12, "cpu")


def test_every_method_is_served(task):
    assert list(task.info.methods) == list(task.info.calls) == list(METHODS)
    assert set(task.info.decisions) == set(task.info.sets) == set(METHODS)
    calls = {"single": 1, "bridge": 6, "bridges": 3, "bridge_network": 4, "distilled": 1, "ensemble": 3}
    assert {name: task.info.calls[name] for name in calls} == calls
    assert task.info.default_method == "bridge"


@pytest.mark.parametrize("method", METHODS)
def test_the_contract(task, folder, method):
    method_contract.check_answers(task, method)
    method_contract.check_calls(task, method)
    method_contract.check_slots(task, method)
    method_contract.check_cost(task, folder, method)
    method_contract.check_max_cost(task, method)
    method_contract.check_purified(task, folder, method)


def test_a_flood_of_all_methods_answers_as_alone(task):
    method_contract.check_flood(task, random.Random(0), list(METHODS))


@contextmanager
def seen_by(task):
    """(network, rows) of every call."""
    seen, networks = [], task.networks
    task.networks = {n: lambda *given, n=n: seen.append((n, len(given[0]))) or networks[n](*given) for n in networks}
    try:
        yield seen
    finally:
        task.networks = networks


def test_calls_of_one_network_share_a_batch_whatever_their_methods_and_others_wait(task):
    for slot, method in enumerate(["bridge", "bridge_network", "cascade", "ensemble", "exits"]):
        task.admit(work(method, IMAGES[slot]), [0], [slot])
    task.step([1])
    task.step([1])
    with seen_by(task) as seen:
        first = task.step([0, 1, 2, 3, 4])
        second = task.step([2, 3, 4])
        third = task.step([3])
    assert seen == [("source", 1), ("bridge-plain", 2), ("exit-1", 2), ("source", 1), ("member-2", 1)]
    assert [stats.waiting for stats in (first, second, third)] == [{2, 3, 4}, {3}, set()]
    assert [stats.rows for stats in (first, second, third)] == [2, 2, 1]


def test_no_row_waits_for_company_for_ever(task):
    task.admit(work("ensemble", IMAGES[0]), [0], [0])
    waited = []
    for _ in range(PATIENCE + 1):
        for slot in (1, 2):
            task.admit(work("bridge", IMAGES[slot]), [0], [slot])
        waited.append(0 in task.step([0, 1, 2]).waiting)
    assert waited == [True] * PATIENCE + [False]


def test_the_task_answers_what_the_evaluation_computes(task, folder):
    """`served.run` computes every method by itself, on networks whose BatchNorms are not folded."""
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    expected = run_split(load_classifier(folder), Split(images, np.zeros(12, np.int64))).p
    assert set(expected) == set(METHODS) - {"cascade"}
    for method, p in expected.items():
        found = np.array([row.probabilities for row in run(task, work(method, *IMAGES))])
        np.testing.assert_allclose(found, p, rtol=1e-3, atol=1e-5, err_msg=method)


# The source in the mean of several bridges


def random_log_p(seed, n=50, k=4):
    return np.log(np.random.default_rng(seed).dirichlet(np.ones(k), n))


def test_the_surplus_source_is_taken_out_exactly():
    """Bridges of teachers {q, a} and {q, b}: their mean holds q twice; w = (M - 1) / (M N) leaves the mean of all."""
    q, a, b = (np.exp(random_log_p(seed)) for seed in range(3))
    each = np.log(np.stack([(q + a) / 2, (q + b) / 2], 1))
    np.testing.assert_allclose(np.exp(mixture(each, np.log(q), (2 - 1) / (2 * 2))), (q + a + b) / 3, atol=1e-12)


def test_a_negative_weight_averages_the_source_in():
    q, a, b = (random_log_p(seed) for seed in range(3))
    found = np.exp(mixture(np.stack([a, b], 1), q, -1 / 2))
    np.testing.assert_allclose(found, (np.exp(q) + np.exp(a) + np.exp(b)) / 3, atol=1e-12)


def test_probabilities_below_nothing_are_clipped():
    log_p, source = np.log([[[0.5, 0.3, 0.2]]]), np.log([[0.98, 0.01, 0.01]])
    found = np.exp(mixture(log_p, source, 0.6))
    assert found[0, 0] == pytest.approx(FLOOR / ((0.3 + 0.2 - 0.6 * 0.02) / 0.4 + FLOOR))
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(mixture(log_p, source, 0.0), log_p[:, 0], atol=1e-12)


# Any number of members, and folders that cannot be served


@pytest.mark.parametrize("members", [1, 2, 8])
def test_ensembles_of_any_size(tmp_path, members):
    task = load(make_zoo(tmp_path, members=members), 4, "cpu")
    assert task.info.methods["ensemble"] == task.info.calls["ensemble"] == members
    [single, ensemble] = [run(task, work(m, IMAGES[0]))[0] for m in ("single", "ensemble")]
    assert sum(ensemble.probabilities) == pytest.approx(1)
    assert (ensemble.uncertainty["mutual_information"] == pytest.approx(0, abs=1e-12)) == (members == 1)
    assert single.uncertainty["entropy"] > 0


def changed_bridges(root, **changes):
    config = read_config(root / "toy-bridge")
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) and key != "serve" else value
    write_json(root / "toy-bridge" / "config.json", config)


OTHER = {"channels": 3}
BELOW_ONE = "serve.bridge.source_weight must be a finite number below 1, got"
REFUSED = {
    "another source": ({"source": {"sha256": "0" * 64}}, "trained on another member-0"),
    "another member as source": ({"source": {"file": "member-1.safetensors"}}, "trained on another member-1"),
    "other preprocessing": ({"source": {"network": OTHER}}, "trained on another member-0"),
    "another tap": ({"source": {"tap": "second"}}, "source.tap is 'second'"),
    "a method it cannot serve": ({"serve": {"ensemble": served(["plain"])}}, "serve.ensemble: a bridge folder serves"),
    "a network it has not": ({"serve": {"bridge": served(["none"])}}, "missing or malformed: KeyError.'none'"),
    "no network": ({"serve": {"bridge": served([])}}, "networks must be one or more"),
    "a network twice": ({"serve": {"bridge": served(["plain", "plain"])}}, "networks must be one or more, each once"),
    "other evaluations": ({"serve": {"bridge": served(["plain"], 3)}}, "evaluations must be 1 or 5"),
    "all of it the source": ({"serve": {"bridge": served(["plain"], 1, 1.0)}}, BELOW_ONE),
    "no finite weight": ({"serve": {"bridge": served(["plain"], 1, -math.inf)}}, BELOW_ONE),
    "no temperature": (
        {"serve": {"bridge": {"networks": ["plain"], "evaluations": 1, "source_weight": 0.0}}},
        "toy-bridge/config.json: serve.bridge.temperature must be a finite number above 0, got None",
    ),
    "cold": ({"serve": {"bridge": served(["plain"]) | {"temperature": 0}}}, "serve.bridge.temperature must be"),
    "not softened": ({"softening": 0}, "toy-bridge/config.json: softening must be a finite number above 0, got 0"),
    "another network's file": (
        {"networks": {"plain": {"network": dataclasses.asdict(dataclasses.replace(LIGHT, widths=(8, 16)))}}},
        "plain.safetensors does not fit networks.plain of config.json: blocks.1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bridges_that_cannot_be_served_are_refused(tmp_path, case):
    changes, words = REFUSED[case]
    folder = make_zoo(tmp_path)
    changed_bridges(tmp_path, **changes)
    with pytest.raises(StoreError, match=words):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tap_channels": 4}, "plain has tap_channels 4, the source needs 8"),
        ({"classes": 4}, "plain has classes 4, the source needs 3"),
        ({"features": 7}, "plain has features 7, the source needs 32"),
        ({"outputs": 1}, "plain has 1 outputs, only 3 logits"),
    ],
)
def test_bridges_of_another_shape_are_refused(tmp_path, changes, words):
    folder = make_zoo(tmp_path)
    write_bridges(tmp_path, {"bridge": served(["plain"])}, {"plain": dataclasses.replace(LIGHT, **changes)})
    with pytest.raises(StoreError, match=words):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["a", "b", "d"]}, "labels is not that of toy"),
        ({"image": [32, 32, 3]}, "image is not that of toy"),
        ({"serve": "none.safetensors"}, "missing or malformed"),
        ({"temperature": None}, "toy-student/config.json: temperature must be a finite number above 0, got None"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be a finite number above 0, got nan"),
        ({"network": dataclasses.asdict(dataclasses.replace(SHAPE, width=16))}, "student-1.safetensors does not fit"),
    ],
)
def test_a_student_of_another_task_is_refused(tmp_path, changes, words):
    folder = make_zoo(tmp_path)
    write_student(tmp_path, **changes)
    with pytest.raises(StoreError, match=words):
        load_classifier(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperatures": {"single": 1.3}}, "toy/config.json: temperatures.ensemble must be a finite number above 0"),
        (
            {"temperatures": {"single": 0, "ensemble": 1.0}},
            "temperatures.single must be a finite number above 0, got 0",
        ),
        ({"temperatures": {"single": math.nan, "ensemble": 1.0}}, "temperatures.single must be .* got nan"),
        ({"network": {"classes": 4}}, "member-0.safetensors does not fit `network` of config.json: fc.bias is"),
    ],
)
def test_an_ensemble_that_cannot_be_served_is_refused(tmp_path, changes, words):
    path = make_zoo(tmp_path) / "config.json"
    config = read_json(path)
    write_json(path, config | {k: config[k] | v if k == "network" else v for k, v in changes.items()})
    with pytest.raises(StoreError, match=words):
        load_classifier(path.parent)


def test_defaults_of_a_shape_need_not_be_spelled_out(tmp_path):
    folder = make_zoo(tmp_path)
    changed_bridges(tmp_path, source={"network": {"classes": 3, "width": 8}})
    assert "bridge" in load_classifier(folder).bridges


@pytest.mark.parametrize(("name", "file"), [("toy-bridge", "plain"), ("toy-student", "student-1")])
def test_damaged_networks_are_refused(tmp_path, name, file):
    folder = make_whole_zoo(tmp_path)
    path = tmp_path / name / f"{file}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="does not match its digest"):
        load_classifier(folder)


def test_networks_that_are_not_numbers_are_refused(tmp_path, monkeypatch):
    def broken(network):
        torch.nn.init.constant_(network.fc.bias, torch.nan)
        return network

    folder = make_zoo(tmp_path)
    monkeypatch.setattr(classifiers, "lively", broken)
    write_student(tmp_path)
    with pytest.raises(StoreError, match=r"student-1.safetensors: fc.bias holds NaN"):
        load_classifier(folder)


def test_the_fingerprint_covers_all_that_is_served(tmp_path):
    folder, seen = make_whole_zoo(tmp_path), set[str]()
    config = read_config(tmp_path / "toy-bridge")
    seen.add(load_classifier(folder).fingerprint)
    for method in config["serve"]:
        for change in ({"temperature": 2.0}, {"source_weight": 0.1}):
            serve = config["serve"] | {method: config["serve"][method] | change}
            write_json(tmp_path / "toy-bridge" / "config.json", config | {"serve": serve})
            seen.add(load_classifier(folder).fingerprint)
    write_student(tmp_path, temperature=3.0)
    seen.add(load_classifier(folder).fingerprint)
    assert len(seen) == 1 + 2 * 3 + 1


def test_parts_have_the_names_that_plans_use(folder):
    classifier = load_classifier(folder)
    names = [part.name for part in parts(classifier)]
    assert len(names) == len(set(names))
    assert {name for plan in classifier.plans().values() for name in plan.networks} == set(names)
