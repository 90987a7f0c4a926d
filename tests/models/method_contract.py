"""What every classify method must keep, on the classifier folder of `classifiers.make_whole_zoo`."""

import numpy as np
import pytest
import torch
from torch import nn

from models.api import UserError
from models.methods.interface import SOURCE
from models.tasks.classifier import load_classifier
from models.tasks.parts import parts
from tests.models.classifiers import IMAGES, flood, run, work

BASE = {"entropy", "margin", "max_probability", "temperature"}
FROM_SOURCE = {"source_entropy", "disagreement_source_vs_estimate"}
OF_MEMBERS = {"expected_entropy", "mutual_information"}


def check_answers(task, method):
    """Probabilities are finite and sum to 1; uncertainty is of the served p, and no more than the method can know."""
    ran = set(task.plans[method].networks)
    members = {name for name in ran if name.startswith("member-")}
    for row in run(task, work(method, *IMAGES)):
        p, said = np.array(row.probabilities), row.uncertainty
        assert p.shape == (len(task.info.labels),)
        assert np.isfinite(p).all()
        assert (p >= 0).all()
        assert p.sum() == pytest.approx(1)
        assert said["entropy"] == pytest.approx(-(p * np.log(p)).sum())
        assert said["max_probability"] == pytest.approx(p.max())
        assert said["margin"] == pytest.approx(np.diff(np.sort(p))[-1])
        assert set(said) >= BASE
        asked_members = bool(members) and (method != "cascade" or row.escalated)
        assert (set(said) >= OF_MEMBERS) == asked_members
        assert set(said) <= BASE | FROM_SOURCE | (OF_MEMBERS if asked_members else set())
        if SOURCE not in ran:
            assert not FROM_SOURCE & set(said)
        for key in ({"source_entropy"} | OF_MEMBERS) & set(said):
            assert 0 <= said[key] <= np.log(len(p)) + 1e-9


def check_calls(task, method):
    """Networks run as the plan says: the source at admission, then one call a tick for the promised number of ticks."""
    seen, networks = [], task.networks

    def counted(name):
        return lambda *given: seen.append((name, len(given[0]))) or networks[name](*given)

    task.networks = {name: counted(name) for name in networks}
    try:
        plan, slots = task.plans[method], [3, 0, 7]
        promised = task.admit(work(method, *IMAGES[:3]), [0, 1, 2], slots)
        assert seen == ([(SOURCE, 3)] if plan.source else [])
        assert promised == [len(plan.calls)] * 3
        assert task.info.calls[method] <= len(plan.networks)
        for call in plan.calls:
            seen.clear()
            task.step(slots)
            assert seen == [(call.network, 3)]
        assert len(task.collect(slots)) == 3
    finally:
        task.networks = networks


def check_slots(task, method):
    """A slot that another row has used, or left half way, answers as a fresh one."""
    expected = run(task, work(method, IMAGES[0]), [5])[0]
    for other in task.info.methods:
        if task.admit(work(other, IMAGES[1]), [0], [5])[0]:
            task.step([5])
        found = run(task, work(method, IMAGES[0]), [5])[0]
        assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-12), other
        assert found.uncertainty == pytest.approx(expected.uncertainty, abs=1e-12), other


def check_cost(task, folder, method):
    """The receipt's cost is what hooks count while the plan's networks run, relative to the source."""
    classifier = load_classifier(folder)
    macs = {part.name: counted(part) for part in parts(classifier)}
    expected = sum(macs[name] for name in task.plans[method].networks) / macs[SOURCE]
    job = work(method, *IMAGES[:2])
    receipt = task.receipt(job, run(task, job))
    if method == "exits":
        check_exits(task, receipt, macs)
    elif method == "cascade":
        assert receipt["cost_vs_single"] <= expected + 1e-9
    else:
        assert receipt == {"method": method, "cost_vs_single": pytest.approx(expected)}


def check_exits(task, receipt, macs):
    """Images are charged for what ran until they left."""
    names = task.plans["exits"].networks
    for stage, cost in zip(receipt["exits"], receipt["image_costs"], strict=True):
        ran = names[: names.index(f"exit-{stage}") + 1]
        assert cost == pytest.approx(sum(macs[name] for name in ran) / macs[SOURCE])
    assert receipt["cost_vs_single"] == pytest.approx(np.mean(receipt["image_costs"]))
    assert receipt["expected_cost"] == task.info.methods["exits"]


def counted(part):
    """Multiply-accumulates of one row, from the shapes of weights and outputs."""
    total, handles, given = [], [], part.example(1)

    def count(module, _, output):
        total.append(output.numel() * module.weight[0].numel())

    for module in part.network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        part.run(*given)
    for handle in handles:
        handle.remove()
    return sum(total)


def check_max_cost(task, method):
    """A budget that cannot be kept is refused by name."""
    with pytest.raises(UserError) as refused:
        task.admit(work(method, IMAGES[0], max_cost=1.0), [0], [0])
    assert refused.value.field == "max_cost"


def check_flood(task, rng, methods):
    """Rows of all methods at once answer as alone, and so does what is decided from them."""
    for _ in range(3):
        order = rng.sample(methods * 2, len(IMAGES)) if 2 * len(methods) >= len(IMAGES) else rng.choices(methods, k=12)
        jobs = [work(method, image, alpha=0.2) for method, image in zip(order, IMAGES, strict=True)]
        alone = [run(task, job, [4])[0] for job in jobs]
        for job, row, expected in zip(jobs, flood(task, jobs, rng), alone, strict=True):
            assert row.probabilities == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6), job.method
            assert row.uncertainty == pytest.approx(expected.uncertainty, rel=1e-3, abs=1e-5), job.method
            assert (row.decision, row.escalated) == (expected.decision, expected.escalated)
            assert row.exit == expected.exit
