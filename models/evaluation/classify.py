"""Evaluate a classifier: every method raw and calibrated, beside deep ensembles of every size.

Definitions: design.md of the house, after Ashukha et al. (ICLR 2020) for DEE. Temperatures are fitted on
the selection half of validation, on the averaged probabilities; the test set is touched by no choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.api import ClassifiedRow, ClassifyWork
from models.backbones.bridge import BridgeNetwork
from models.backbones.resnet import ResNet
from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.evaluation.metrics import accuracy, brier, deep_ensemble_equivalent, ece
from models.evaluation.turns import alternate
from models.store import read_config
from models.tasks.classifier import bridge_folder, load_bridge_network, load_classifier, load_members, to_pixels
from models.tasks.classify import ClassifyTask
from models.training.data import Images, Split, Splits
from models.uncertainty.scores import fit_temperature, log_softmax, mean_log_probability, nll, soften

Floats = NDArray[np.float64]
WORTH_MORE_STEPS = 0.002  # nats of validation NLL that a bridge must gain to be served with all its steps


@dataclass(frozen=True)
class Score:
    """One method on the test set; `temperature` was fitted on validation, c: at it."""

    acc: float
    nll: float
    brier: float
    ece: float
    temperature: float
    cnll: float
    cbrier: float
    cece: float


def score(selection: tuple[Floats, NDArray[np.int64]], test: tuple[Floats, NDArray[np.int64]]) -> Score:
    """Score log probabilities (N, K): the temperature from `selection`, the metrics from `test`."""
    temperature = fit_temperature(*selection)
    log_p, labels = test
    raw, calibrated = soften(log_p, 1.0), soften(log_p, temperature)
    return Score(
        acc=accuracy(raw, labels),
        nll=nll(raw, labels),
        brier=brier(raw, labels),
        ece=ece(raw, labels),
        temperature=temperature,
        cnll=nll(calibrated, labels),
        cbrier=brier(calibrated, labels),
        cece=ece(calibrated, labels),
    )


def mean_score(scores: list[Score]) -> Score:
    """Field by field."""
    return Score(*(float(np.mean(values)) for values in zip(*(vars(s).values() for s in scores), strict=True)))


@torch.inference_mode()
def member_log_probabilities(members: list[ResNet], split: Split) -> Floats:
    """(N, M, K) float64."""
    parts = []
    for i in range(0, len(split), 1000):
        x = to_pixels(split.images[i : i + 1000])
        parts.append(torch.stack([m(x) for m in members], 1).double().numpy())
    return log_softmax(np.concatenate(parts))


@torch.inference_mode()
def bridge_log_probabilities(source: ResNet, network: BridgeNetwork, split: Split, evaluations: int) -> Floats:
    """(N, K) float64 log probabilities of a bridge on the source's tap."""
    parts = []
    for i in range(0, len(split), 1000):
        tap = source.tap(to_pixels(split.images[i : i + 1000]))
        features = source.features(tap)
        parts.append(run_bridge(network, tap, source.fc(features), evaluations, TEMPERATURE, features).double().numpy())
    return log_softmax(np.concatenate(parts))


def variants(networks: dict[str, nn.Module]) -> dict[str, tuple[BridgeNetwork, int]]:
    """Ways to run each network: at one evaluation and, when it has more steps, at all of them."""
    ways: dict[str, tuple[BridgeNetwork, int]] = {}
    for name, network in networks.items():
        assert isinstance(network, BridgeNetwork)
        for evaluations in sorted({1, network.config.steps}):
            ways[f"{name} x{evaluations}"] = network, evaluations
    return ways


@dataclass(frozen=True)
class Chosen:
    """What validation chose: config entries of the bridge folder, and calibrated NLL of every variant."""

    config: dict[str, Any]
    scores: dict[str, float]


def choose_bridge(networks: dict[str, nn.Module], ensemble: Path, selection: Split) -> Chosen:
    """Pick the bridge by calibrated NLL on validation; one evaluation unless all its steps are worth their cost.

    Candidates are `bridge-<seed>`; regressors and the logit input are scored beside.
    """
    source = load_members(ensemble)[0]
    scores, temperatures = {}, {}
    for name, (network, evaluations) in variants(networks).items():
        log_p = bridge_log_probabilities(source, network, selection, evaluations)
        temperatures[name] = fit_temperature(log_p, selection.labels)
        scores[name] = nll(soften(log_p, temperatures[name]), selection.labels)
    best = min((n for n in scores if n.startswith("bridge") and n.endswith("x1")), key=lambda n: scores[n])
    network, evaluations = variants(networks)[best]
    whole = best.replace("x1", f"x{network.config.steps}")
    if scores[best] - scores[whole] > WORTH_MORE_STEPS:
        best, evaluations = whole, network.config.steps
    entry = {"networks": [best.split(" ")[0]], "evaluations": evaluations, "source_weight": 0.0}
    tables = {
        name: {"kind": name.split("-")[0], "network": vars(n.config)}
        for name, n in networks.items()
        if isinstance(n, BridgeNetwork)
    }
    config = {
        "softening": TEMPERATURE,
        "networks": tables,
        "serve": {"bridge": entry | {"temperature": temperatures[best]}},
    }
    return Chosen(config, scores)


def calibrate(ensemble: Path, selection: Split) -> dict[str, float]:
    """Validation temperatures of `single` and `ensemble`."""
    log_p = member_log_probabilities(load_members(ensemble), selection)
    return {
        "single": fit_temperature(log_p[:, 0], selection.labels),
        "ensemble": fit_temperature(mean_log_probability(log_p), selection.labels),
    }


def measure_times(runs: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Seconds of each, the fastest of turns that alternate, so that neighbours on the machine matter little."""
    return {name: float(values.min()) for name, values in alternate(runs, repeats).items()}


@torch.inference_mode()
def time_methods(ensemble: Path, batch: int = 64) -> dict[str, float]:
    """Measured time of every row of the table relative to the source, at `batch` images."""
    classifier = load_classifier(ensemble)
    height, width, channels = classifier.config["image"]
    x, members = torch.rand(batch, channels, height, width), classifier.members

    def run_members(m: int) -> Any:
        return [member(x) for member in members[:m]]

    runs: dict[str, Callable[[], Any]] = {"source": lambda: members[0](x)}
    for m in range(2, len(members) + 1):
        runs[f"DE-{m}"] = partial(run_members, m)
    if (bridge := classifier.bridge) is not None:

        def bridged(evaluations: int) -> Any:
            tap = members[0].tap(x)
            features = members[0].features(tap)
            return run_bridge(network, tap, members[0].fc(features), evaluations, bridge.softening, features)

        network = next(iter(bridge.networks.values()))
        for evaluations in {1, network.config.steps}:
            runs[f"bridge x{evaluations}"] = partial(bridged, evaluations)
    seconds = measure_times(runs)
    return {name: value / seconds["source"] for name, value in seconds.items()}


def costs_by_row(ensemble: Path) -> dict[str, float]:
    """Conv + linear MACs of every row of the table relative to the source."""
    classifier = load_classifier(ensemble)
    costs = {"source": 1.0, "source at T*": 1.0} | {f"DE-{m}": float(m) for m in range(1, len(classifier.members) + 1)}
    if classifier.bridge is not None:
        light = (classifier.costs()["bridge"] - 1.0) / len(classifier.plans()["bridge"].calls)
        steps = next(iter(classifier.bridge.networks.values())).config.steps
        costs |= {"bridge x1": 1 + light, f"bridge x{steps}": 1 + steps * light, "mse x1": 1 + light}
    return costs


def classify_images(task: ClassifyTask, method: str, images: Images) -> list[ClassifiedRow]:
    """Run uint8 images (N, H, W, C) through the task, in pool-sized jobs."""
    rows: list[ClassifiedRow] = []
    for i in range(0, len(images), task.capacity):
        part = tuple(image.tobytes() for image in images[i : i + task.capacity])
        work = ClassifyWork(model=task.info.name, images=part, method=method, top_k=1)  # type: ignore[arg-type]
        slots = list(range(len(part)))
        left = dict(zip(slots, task.admit(work, slots, slots), strict=True))
        while moving := [slot for slot, calls in left.items() if calls]:
            finished = task.step(moving).finished
            left |= {slot: 0 if slot in finished else left[slot] - 1 for slot in moving}
        rows += task.collect(slots)
    return rows


def evaluate(ensemble: Path, splits: Splits) -> dict[str, Any]:
    """Everything the table shows: rows by method, DE curve, share of the gap recovered with its interval."""
    selection, test = splits.selection, splits.test
    members = load_members(ensemble)
    val_p, test_p = (member_log_probabilities(members, s) for s in (selection, test))

    def ensemble_score(which: tuple[int, ...]) -> Score:
        val, tst = (mean_log_probability(p[:, list(which)]) for p in (val_p, test_p))
        return score((val, selection.labels), (tst, test.labels))

    m = len(members)
    ensembles = {
        size: mean_score([ensemble_score(w) for w in itertools.combinations(range(m), size)])
        for size in range(1, m + 1)
    }
    source = ensemble_score((0,))
    softened = [log_softmax(mean_log_probability(p[:, :1]) / source.temperature) for p in (val_p, test_p)]
    at_best = score((softened[0], selection.labels), (softened[1], test.labels))
    rows: dict[str, list[Score]] = {
        "source": [source],
        "source at T*": [at_best],
        **{f"DE-{k}": [v] for k, v in ensembles.items()},
    }
    beside = bridge_folder(ensemble)
    if beside is not None:
        config = read_config(beside, "bridge")
        networks: dict[str, nn.Module] = {
            name: load_bridge_network(beside, config, name) for name in config["networks"]
        }
        for name, (network, evaluations) in variants(networks).items():
            val, tst = (bridge_log_probabilities(members[0], network, s, evaluations) for s in (selection, test))
            kind = f"{config['networks'][name.split(' ')[0]]['kind']} x{evaluations}"
            rows.setdefault(kind, []).append(score((val, selection.labels), (tst, test.labels)))
    curve = {k: v.cnll for k, v in ensembles.items()}
    gap = source.cnll - curve[3]
    recovered = {
        kind: interval([(source.cnll - s.cnll) / gap for s in scores])
        for kind, scores in rows.items()
        if kind.startswith(("bridge", "mse"))
    }
    dee = {kind: interval([deep_ensemble_equivalent(s.cnll, curve) for s in scores]) for kind, scores in rows.items()}
    return {"rows": rows, "dee": dee, "recovered": recovered, "curve": curve}


def interval(values: list[float]) -> dict[str, float]:
    """Mean, standard error and 95 % t-interval of a few seeds."""
    t95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    n, mean = len(values), float(np.mean(values))
    if n not in t95:
        return {"mean": mean, "n": n}
    se = float(np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "se": se, "low": mean - t95[n] * se, "high": mean + t95[n] * se, "n": n}
