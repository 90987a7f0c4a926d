"""The classifier's task on small random networks: methods mixed in one batch, keys by method, mismatches refused."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from models.api import ClassifyWork, Task, UserError
from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.backbones.resnet import ResNet, ResNetConfig
from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.store import StoreError, read_config, write_json, write_model
from models.tasks.classifier import load_classifier
from models.tasks.classify import load

LABELS = ["a", "b", "c"]
BASE = {"entropy", "margin", "max_probability", "temperature"}
SOURCE = {"source_entropy", "disagreement_source_vs_estimate"}
KEYS = {
    "single": BASE,
    "bridge": BASE | SOURCE,
    "ensemble": BASE | SOURCE | {"expected_entropy", "mutual_information"},
}


def make_zoo(root, evaluations=5):
    torch.manual_seed(0)
    network = ResNetConfig(classes=3, width=8)
    members = {f"member-{i}.safetensors": ResNet(network).state_dict() for i in range(3)}
    config = {
        "kind": "ensemble",
        "name": "toy",
        "backbone": "resnet",
        "network": dataclasses.asdict(network),
        "labels": LABELS,
        "image": [28, 28, 1],
        "members": list(members),
        "temperatures": {"single": 1.3, "ensemble": 1.1},
    }
    write_model(root / "toy", config, members)
    shape = BridgeConfig(tap_channels=8, classes=3, widths=(8, 12), strides=(1, 2), expands=(2, 2))
    bridge = BridgeNetwork(shape)
    torch.nn.init.normal_(bridge.fc.weight)
    for table in bridge.time:
        torch.nn.init.normal_(table.weight)
    source = "member-0.safetensors"
    write_model(
        root / "toy-bridge",
        {
            "kind": "bridge",
            "name": "toy-bridge",
            "backbone": "bridge",
            "ensemble": "toy",
            "source": {"file": source, "sha256": read_config(root / "toy")["files"][source]},
            "serve": "bridge-1.safetensors",
            "evaluations": evaluations,
            "softening": TEMPERATURE,
            "temperature": 1.2,
            "network": dataclasses.asdict(shape),
        },
        {"bridge-1.safetensors": bridge.state_dict()},
    )
    return root / "toy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def task(folder):
    return load(folder, 12, "cpu")


IMAGES = [np.random.default_rng(i).integers(0, 256, (28, 28, 1), dtype=np.uint8).tobytes() for i in range(12)]


def work(method, *images, **options):
    return ClassifyWork(model="toy", images=tuple(images), method=method, top_k=2, **options)


def run(task, job, slots=None):
    slots = slots or list(range(job.rows))
    left = dict(zip(slots, task.admit(job, range(job.rows), slots), strict=True))
    while moving := [slot for slot, n in left.items() if n]:
        finished = task.step(moving).finished
        assert finished <= set(moving)
        left |= {slot: 0 if slot in finished else left[slot] - 1 for slot in moving}
    return task.collect(slots)


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
    left, own, waiting, mixed = {}, {}, list(range(12)), {}
    while waiting or left:
        if waiting and rng.random() < 0.8:
            index = waiting.pop()
            own[index], left[index] = index, task.admit(jobs[index], [0], [index])[0]
        stepping = [slot for slot, n in left.items() if n]
        if stepping:
            task.step(rng.sample(stepping, len(stepping)))
        for slot in list(left):
            if not left[slot]:
                mixed[slot] = task.collect([slot])[0]
                del left[slot]
            elif slot in stepping:
                left[slot] -= 1
    for i in range(12):
        assert mixed[i].probabilities == pytest.approx(alone[i].probabilities, rel=1e-4, abs=1e-6), jobs[i].method


def test_the_stepwise_bridge_is_the_sampler(folder, task):
    classifier = load_classifier(folder)
    x = torch.from_numpy(np.frombuffer(IMAGES[0], np.uint8).copy()).view(1, 1, 28, 28).float() / 255
    source = classifier.members[0]
    tap = source.tap(x)
    z = run_bridge(classifier.bridge.network, tap, source(x), 5, TEMPERATURE)
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
