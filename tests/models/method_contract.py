"""What every classify method must keep, on the classifier folder of `classifiers.make_whole_zoo`."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from models.api import UserError
from models.evaluation.attacks import bridged, methods
from models.methods.interface import SOURCE
from models.purification.purify import Dose, Purifier, image_keys
from models.tasks.classifier import load_classifier, to_pixels
from models.tasks.parts import parts
from models.uncertainty.scores import soften
from tests.models.classifiers import IMAGES, flood, run, work

BASE = {"entropy", "margin", "max_probability", "temperature"}
FROM_SOURCE = {"source_entropy", "disagreement_source_vs_estimate"}
DOSE = Dose(u=0.3, steps=2, draws=1)
OF_FEATURES = {"feature_distance"}
OF_MEMBERS = {"expected_entropy", "mutual_information"}


def check_answers(task, method):
    """Probabilities are finite and sum to 1; uncertainty is of the served p, and no more than the method can know."""
    ran = set(task.plans[method].networks)
    measures = len(task.networks[SOURCE](task.pixels[:1])) > 3
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
        assert set(said) <= BASE | FROM_SOURCE | OF_FEATURES | (OF_MEMBERS if asked_members else set())
        assert (set(said) >= OF_FEATURES) == (measures and task.plans[method].networks[0] in (SOURCE, "exit-1"))
        if SOURCE not in ran and not row.escalated:
            assert not FROM_SOURCE & set(said)
        for key in ({"source_entropy"} | OF_MEMBERS) & set(said):
            assert 0 <= said[key] <= np.log(len(p)) + 1e-9


def check_calls(task, method):
    """Networks run as the plan says: the source in the first tick, and one call a tick for the promised number."""
    seen, networks = [], task.networks

    def counted(name):
        return lambda *given: seen.append((name, len(given[0]))) or networks[name](*given)

    task.networks = {name: counted(name) for name in networks}
    try:
        plan, slots = task.plans[method], [3, 0, 7]
        promised = task.admit(work(method, *IMAGES[:3]), [0, 1, 2], slots)
        assert seen == []
        assert promised == [max(1, len(plan.calls))] * 3
        assert task.info.calls[method] <= len(plan.networks)
        left = slots
        for tick in range(promised[0]):
            seen.clear()
            over = task.step(left).finished if left else frozenset()
            due = [SOURCE] * (plan.source and tick == 0) + [call.network for call in plan.calls[tick : tick + 1]]
            assert seen == ([(network, len(left)) for network in due] if left else [])
            left = [slot for slot in left if slot not in over]
        assert len(task.collect(slots)) == 3
    finally:
        task.networks = networks


def check_slots(task, method):
    """A slot that another row has used, or left half way, answers as a fresh one."""
    expected = run(task, work(method, IMAGES[0]), [5])[0]
    purified = task.info.purifier.methods if task.info.purifier else ()
    for other, options in [*((name, {}) for name in task.info.methods), *((name, {"purify": 2}) for name in purified)]:
        if task.admit(work(other, IMAGES[1], **options), [0], [5])[0]:
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
        task.admit(work(method, IMAGES[0], max_cost=0.1), [0], [0])
    assert refused.value.field == "max_cost"


def asked(task, method, rng):
    """Either sets, or up to 16 draws of noise where the method answers purified images."""
    can = task.info.purifier is not None and method in task.info.purifier.methods
    return {"purify": rng.randint(1, 16)} if can and rng.random() < 0.5 else {"alpha": 0.2}


def check_purified(task, folder, method):
    """A purified answer is the mean over draws of the method's own on the purifier's pixels; its receipt says so."""
    if method not in task.info.purifier.methods:
        with pytest.raises(UserError) as refused:
            task.admit(work(method, IMAGES[0], purify=1), [0], [0])
        assert refused.value.field == "purify"
        return
    purifier = task.info.purifier
    for draws in (1, 3):
        job = work(method, *IMAGES[:4], purify=draws)
        rows, by_hand = run(task, job), purified_by_hand(folder, method, draws)
        for row, p in zip(rows, by_hand(rows[0].uncertainty["temperature"]), strict=True):
            assert row.probabilities == pytest.approx(p, rel=1e-3, abs=1e-5)
            assert row.uncertainty["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-3)
            assert set(row.uncertainty) == BASE
            assert (row.decision, row.prediction_set) == (None, None)
        cost = draws * (purifier.cost + task.info.methods[method])
        dose = {"u": 0.3, "steps": 2, "draws": draws}
        assert task.receipt(job, rows) == {"method": method, "cost_vs_single": pytest.approx(cost), "purified": dose}


def purified_by_hand(folder, method, draws):
    """Probabilities (4, K) of the first images at a temperature, without the task."""
    classifier, purifier = load_classifier(folder), Purifier.load(folder.parent / "toy-dit", (28, 28, 1), DOSE, "eco")
    purifier = dataclasses.replace(purifier, dose=dataclasses.replace(DOSE, draws=draws))
    x = to_pixels(np.stack([np.frombuffer(image, np.uint8).reshape(28, 28, 1) for image in IMAGES[:4]]))
    ways = methods(classifier) | {"distilled": lambda x: classifier.student.network(x).log_softmax(1)}
    ways |= {
        name: lambda x, bridge=bridge: bridged(classifier, bridge, x) for name, bridge in classifier.bridges.items()
    }
    with torch.no_grad():
        log_p = ways[method](purifier(x, image_keys(IMAGES[:4])).flatten(0, 1)).double().numpy()
    return lambda temperature: soften(log_p, temperature).reshape(4, draws, -1).mean(1)


def check_flood(task, rng, methods):
    """Rows of all methods at once answer as alone, and so does what is decided from them."""
    for _ in range(3):
        order = rng.sample(methods * 2, len(IMAGES)) if 2 * len(methods) >= len(IMAGES) else rng.choices(methods, k=12)
        jobs = [work(method, image, **asked(task, method, rng)) for method, image in zip(order, IMAGES, strict=True)]
        alone = [run(task, job, [4])[0] for job in jobs]
        for job, row, expected in zip(jobs, flood(task, jobs, rng), alone, strict=True):
            assert row.probabilities == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6), job.method
            assert row.uncertainty == pytest.approx(expected.uncertainty, rel=1e-3, abs=1e-5), job.method
            assert (row.decision, row.escalated) == (expected.decision, expected.escalated)
            assert row.exit == expected.exit
