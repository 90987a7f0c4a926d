"""What validation decides when a bridge folder is made: which network is served, and temperatures.

Validation here is its selection half; the test set is touched by no choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.backbones.bridge import BridgeNetwork
from models.backbones.resnet import ResNet
from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.tasks.classifier import load_members, to_pixels
from models.training.data import Split
from models.uncertainty.scores import fit_temperature, log_softmax, mean_log_probability, nll, soften

Floats = NDArray[np.float64]
WORTH_MORE_STEPS = 0.002  # nats of validation NLL that a bridge must gain to be served with all its steps


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
        name: {"kind": name.split("-")[0], "seed": int(name.partition("-")[2] or 0), "network": vars(n.config)}
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
