"""Method exits: rows leave where they are sure enough, and only the stages that they need run; folders refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.api import Runtime
from models.evaluation import leaving
from models.evaluation.costs import Counter, parameters
from models.evaluation.served import run as run_split
from models.store import StoreError, read_config, sha256, write_json, write_model
from models.tasks.classifier import load_classifier, to_pixels
from models.tasks.classify import load
from models.training.data import Split
from tests.models.classifiers import IMAGES, LEAVING, make_zoo, run, work, write_distance, write_exits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_zoo(tmp_path_factory.mktemp("zoo"), evaluations=1, members=2)
    write_exits(folder.parent)
    write_distance(folder.parent)
    return folder


@pytest.fixture
def task(folder):
    return load(folder, 12, "cpu")


def counting(task):
    """The calls that are made from now on, as (network, rows)."""
    seen, networks = [], task.networks
    task.networks = {n: lambda *given, n=n: seen.append((n, len(given[0]))) or networks[n](*given) for n in networks}
    return seen


def test_only_what_is_needed_runs_and_the_source_does_not(task):
    seen = counting(task)
    rows = run(task, work("exits", *IMAGES))
    left = np.array([row.exit for row in rows])
    assert set(left) == {1, 2, 3}
    assert seen == [(f"exit-{stage}", int((left >= stage).sum())) for stage in (1, 2, 3)]


def test_rows_leave_as_soon_as_they_are_sure(task, folder):
    exits = load_classifier(folder).exits
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    with torch.inference_mode():
        logits = torch.stack(exits.every(to_pixels(images)), 1)
    for row, z in zip(run(task, work("exits", *IMAGES)), logits, strict=True):
        sure = (z / 0.1).softmax(-1).amax(-1)
        expected = 1 if sure[0] >= 0.9784 else 2 if sure[1] >= 0.665 else 3
        temperature = LEAVING["temperatures"][expected - 1]
        assert row.exit == expected
        assert row.uncertainty["temperature"] == temperature
        assert row.probabilities == pytest.approx((z[expected - 1] / temperature).softmax(-1).tolist(), abs=1e-5)


def test_the_receipt_says_who_left_where_and_what_it_cost(task, folder):
    job, classifier = work("exits", *IMAGES), load_classifier(folder)
    receipt, macs = task.receipt(job, rows := run(task, job)), classifier.macs
    costs = np.cumsum([macs[f"exit-{stage}"] for stage in (1, 2, 3)]) / macs["source"]
    assert receipt["exits"] == [row.exit for row in rows]
    assert receipt["image_costs"] == pytest.approx([costs[row.exit - 1] for row in rows])
    assert receipt["cost_vs_single"] == pytest.approx(np.mean(receipt["image_costs"]))
    assert receipt["expected_cost"] == pytest.approx(np.dot(costs, LEAVING["shares"]))
    assert (task.info.methods["exits"], task.info.calls["exits"]) == (receipt["expected_cost"], 2)


def test_a_stage_without_a_threshold_runs_no_head(tmp_path):
    folder = make_zoo(tmp_path, evaluations=1, members=1)
    write_exits(tmp_path, thresholds=[0.9784, None], shares=[0.6, 0.0, 0.4])
    task = load(folder, 12, "cpu")
    seen = counting(task)
    rows = run(task, work("exits", *IMAGES))
    assert {row.exit for row in rows} == {1, 3}
    assert [name for name, _ in seen] == ["exit-1", "exit-3"]
    full = load_classifier(folder).macs
    assert max(task.receipt(work("exits", *IMAGES), rows)["image_costs"]) == pytest.approx(
        (full["exit-1"] + full["exit-3"]) / full["source"]
    )


def test_a_backend_answers_the_same(task, folder, tmp_path):
    exported = load(folder, 12, "cpu", Runtime(backend="onnx", cache=str(tmp_path)))
    assert exported.info.backend.startswith("onnx: ")
    for row, wanted in zip(*(run(t, work("exits", *IMAGES)) for t in (exported, task)), strict=True):
        assert row.exit == wanted.exit
        assert row.uncertainty == pytest.approx(wanted.uncertainty, rel=1e-3, abs=1e-4)
        assert row.probabilities == pytest.approx(wanted.probabilities, rel=1e-3, abs=1e-5)


def test_the_evaluation_knows_who_left(task, folder):
    images = np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES])
    found = run_split(load_classifier(folder), Split(images, np.zeros(12, np.int64)))
    assert [row.exit for row in run(task, work("exits", *IMAGES))] == (found.left + 1).tolist()
    assert not {"source_entropy", "disagreement_source_vs_estimate"} & set(found.scores("exits"))


REFUSED = {
    "another source": (
        {"source": {"file": "member-0.safetensors", "sha256": "0" * 64}},
        "re-run `offramp train heads`",
    ),
    "other heads": ({"heads": {"grid": 3, "hidden": 6}}, "does not fit the source"),
    "no heads": ({"heads": {}}, "missing or malformed"),
    "no such network": ({"serve": "heads-2"}, "files has no heads-2.safetensors"),
    "two temperatures": ({"temperatures": [1.0, 1.0]}, "3 stages need 2 thresholds, 3 temperatures"),
    "no temperature": ({"temperatures": [1.0, 0.0, 1.0]}, "temperatures must be above 0"),
    "not a threshold": ({"thresholds": [float("nan"), 0.5]}, "thresholds must be probabilities"),
    "nobody leaves": ({"thresholds": [None, None]}, "one of them may be null"),
    "shares": ({"shares": [0.5, 0.5, 0.5]}, "shares must be 0 or more and sum to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(tmp_path, case):
    changes, words = REFUSED[case]
    folder, path = make_zoo(tmp_path, evaluations=1, members=1), tmp_path / "toy-exits"
    write_exits(tmp_path, **{key: value for key, value in changes.items() if key in LEAVING})
    write_json(path / "config.json", read_config(path) | {k: v for k, v in changes.items() if k not in LEAVING})
    with pytest.raises(StoreError, match=words):
        load_classifier(folder)


def test_heads_that_are_not_numbers_are_refused(tmp_path):
    folder, path = make_zoo(tmp_path, evaluations=1, members=1), tmp_path / "toy-exits"
    write_exits(tmp_path)
    tensors = load_file(path / "heads-1.safetensors")
    tensors["heads.1.out.bias"][0] = torch.nan
    write_model(path, read_config(path), {"heads-1.safetensors": tensors})
    assert sha256(path / "heads-1.safetensors") == read_config(path)["files"]["heads-1.safetensors"]
    with pytest.raises(StoreError, match=r"heads.1.out.bias holds NaN"):
        load_classifier(folder)


@pytest.mark.parametrize("key", ["thresholds", "confidence_temperatures", "temperatures"])
def test_the_fingerprint_covers_when_rows_leave(tmp_path, key):
    folder, seen = make_zoo(tmp_path, evaluations=1, members=1), set()
    seen.add(load_classifier(folder).fingerprint)
    for changes in ({}, {key: [0.9 for _ in LEAVING[key]]}):
        write_exits(tmp_path, **changes)
        seen.add(load_classifier(folder).fingerprint)
    assert len(seen) == 3


def test_the_evaluations_row_is_what_is_served(folder):
    classifier = load_classifier(folder)
    random = np.random.default_rng(5)
    split = Split(random.integers(0, 256, (90, 28, 28, 1), dtype=np.uint8), random.integers(0, 3, 90))
    found = run_split(classifier, split)
    [exits] = leaving.load_seeds(folder, classifier.members[0])
    np.testing.assert_allclose(np.exp(leaving.leave(exits, split, batch=40)[0]), found.p["exits"], atol=1e-5)
    counter = Counter(classifier.members, None, (28, 28, 1))
    cost = leaving.cost_of_exits(counter, exits, found.left)
    assert cost.macs == pytest.approx(np.mean([exits.costs[k] for k in found.left]))
    assert set(cost.times) == {1, 32}
    assert min(cost.times.values()) > 0
    held = {id(p): p.numel() for e in exits.networks for p in e.parameters()}
    assert cost.parameters == pytest.approx(sum(held.values()) / parameters(classifier.members[0]))
