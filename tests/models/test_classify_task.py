"""The classifier's task on small random networks: methods mixed in one batch, keys by method, mismatches refused."""

import json
import random

import numpy as np
import pytest
import torch

from models.api import Task, UserError
from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.store import StoreError, read_config, write_json
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from tests.models.classifiers import IMAGES, flood, make_zoo, run, work

BASE = {"entropy", "margin", "max_probability", "temperature"}
SOURCE = {"source_entropy", "disagreement_source_vs_estimate"}
KEYS = {
    "single": BASE,
    "bridge": BASE | SOURCE,
    "ensemble": BASE | SOURCE | {"expected_entropy", "mutual_information"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def task(folder):
    return load(folder, 12, "cpu")


def test_it_is_a_task(task):
    assert isinstance(task, Task)
    assert task.info.default_method == "bridge"
    assert task.info.calls == {"single": 1, "bridge": 6, "ensemble": 3}


@pytest.mark.parametrize("method", sorted(KEYS))
def test_probabilities_and_uncertainty_by_method(task, method):
    for row in run(task, work(method, *IMAGES[:4])):
        assert sum(row.probabilities) == pytest.approx(1)
        assert set(row.uncertainty) == KEYS[method]
        p = np.array(row.probabilities)
        assert row.uncertainty["entropy"] == pytest.approx(-(p * np.log(p)).sum())
        assert row.uncertainty["max_probability"] == pytest.approx(p.max())


def test_rows_of_all_methods_share_ticks_and_answer_as_alone(task):
    rng = random.Random(0)
    jobs = [work(rng.choice(sorted(KEYS)), image) for image in IMAGES]
    alone = [run(task, job, [4])[0] for job in jobs]
    mixed = flood(task, jobs, rng)
    for i in range(12):
        assert mixed[i].probabilities == pytest.approx(alone[i].probabilities, rel=1e-4, abs=1e-6), jobs[i].method


def test_the_stepwise_bridge_is_the_sampler(folder, task):
    classifier = load_classifier(folder)
    x = torch.from_numpy(np.frombuffer(IMAGES[0], np.uint8).copy()).view(1, 1, 28, 28).float() / 255
    source = classifier.members[0]
    tap = source.tap(x)
    z = run_bridge(classifier.bridge.networks["plain"], tap, source(x), 5, TEMPERATURE)
    expected = (z.double().log_softmax(1) / 1.2).softmax(1)[0]
    assert run(task, work("bridge", IMAGES[0]))[0].probabilities == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("pixels", [28 * 28 * 3, 28 * 28 - 1, 0])
def test_pictures_of_another_shape_are_refused(task, pixels):
    with pytest.raises(UserError, match=r"image 1 has .* takes \(28, 28, 1\)") as refused:
        task.admit(work("bridge", IMAGES[0], bytes(pixels)), [0, 1], [0, 1])
    assert refused.value.field == "images"


def test_costs_are_relative_macs(task):
    receipt = task.receipt(work("ensemble", IMAGES[0]), [])
    assert receipt == {"method": "ensemble", "cost_vs_single": 3.0}
    assert 1 < task.info.methods["bridge"] < 3


def test_a_bridge_of_other_weights_is_refused(tmp_path):
    folder = make_zoo(tmp_path)
    config = read_config(tmp_path / "toy-bridge")
    config["source"]["sha256"] = "0" * 64
    write_json(tmp_path / "toy-bridge" / "config.json", config)
    with pytest.raises(StoreError, match=r"trained on another member-0"):
        load(folder, 4, "cpu")


def test_without_a_bridge_the_ensemble_serves_alone(tmp_path):
    folder = make_zoo(tmp_path)
    config = json.loads((tmp_path / "toy-bridge" / "config.json").read_text())
    write_json(tmp_path / "toy-bridge" / "config.json", config | {"ensemble": "another"})
    info = load(folder, 4, "cpu").info
    assert set(info.methods) == {"single", "ensemble"}
    assert info.default_method == "single"


def test_one_evaluation_takes_the_source_end(tmp_path):
    task = load(make_zoo(tmp_path, evaluations=1), 4, "cpu")
    assert task.info.calls["bridge"] == 2
    assert task.admit(work("bridge", IMAGES[0]), [0], [0]) == [1]
