"""Which of the trained networks a bridge folder serves, and how: chosen on validation, likeliest answers first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.bridge import BridgeNetwork
from models.backbones.resnet import ResNet
from models.bridge.mixture import mixture
from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.store import write_model
from models.training.bridge import PAIRS, BridgeRecipe, Run
from models.training.data import Split
from models.training.members import pixels_of
from models.training.session import device_of
from models.uncertainty.scores import fit_temperature, log_softmax, nll, soften

Floats = NDArray[np.float64]
DIRECT = ("bridge", "distilled", "mse", "kl")  # kinds that learn from all members, one network each
WORTH_MORE_STEPS = 0.002  # nats of validation NLL that a bridge must gain to be served with all its steps


@dataclass(frozen=True)
class Served:
    """An entry of `serve` in a bridge folder, and the validation NLL that it reaches at its temperature."""

    networks: tuple[str, ...]
    evaluations: int
    source_weight: float
    temperature: float
    nll: float

    def entry(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"networks": list(self.networks)} | {
            key: getattr(self, key) for key in ("evaluations", "source_weight", "temperature")
        }


class Validation:
    """The selection split as networks on one source see it; every network runs once."""

    def __init__(self, source: ResNet, split: Split) -> None:
        self.source, self.split = source, split
        self.answers: dict[tuple[str, int], Floats] = {}

    @cached_property
    @torch.inference_mode()
    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Taps (N, C, H, W), features (N, F) and logits (N, K) of the source."""
        parts, device = [], device_of(self.source)
        for i in range(0, len(self.split), 1000):
            tap = self.source.tap(pixels_of(self.split.images[i : i + 1000], device))
            late = self.source.features(tap)
            parts.append((tap, late, self.source.fc(late)))
        taps, features, logits = (torch.cat(p) for p in zip(*parts, strict=True))
        return taps, features, logits

    def log_probabilities(self, name: str, network: BridgeNetwork, evaluations: int) -> Floats:
        """Of one network (N, K); `name` is what it is remembered by."""
        if (name, evaluations) not in self.answers:
            rows = zip(*(t.split(1000) for t in self.seen), strict=True)
            z = [run_bridge(network, tap, own, evaluations, TEMPERATURE, late) for tap, late, own in rows]
            self.answers[name, evaluations] = log_softmax(torch.cat(z).double().cpu().numpy())
        return self.answers[name, evaluations]

    def score(self, networks: Mapping[str, BridgeNetwork], evaluations: int = 1, source_weight: float = 0.0) -> Served:
        """The mixture of some networks at its best temperature."""
        each = np.stack([self.log_probabilities(n, net, evaluations) for n, net in networks.items()], 1)
        log_p = mixture(each, log_softmax(self.seen[2].double().cpu().numpy()), source_weight)
        temperature = fit_temperature(log_p, self.split.labels)
        value = nll(soften(log_p, temperature), self.split.labels)
        return Served(tuple(networks), evaluations, source_weight, temperature, value)


def choose(
    recipe: BridgeRecipe, todo: Sequence[Run], networks: Mapping[str, BridgeNetwork], validation: Validation
) -> tuple[dict[str, Served], dict[str, list[float]]]:
    """What to serve by method, and validation NLL of every way over its seeds.

    A way (a kind, its evaluations, its source weight) is chosen by its mean over seeds, then the best of its seeds.
    A bridge's T evaluations must be worth `WORTH_MORE_STEPS`.
    """
    ways = {"bridge": singles(todo, networks, validation), "bridges": several(recipe, todo, networks, validation)}
    ways["bridge_network"] = mixtures("curve", -1.0 / max(len(recipe.curve.ends), 1), todo, networks, validation)
    found = {name: [s.nll for s in scores] for each in ways.values() for name, scores in each.items()}

    def rank(name: str) -> float:
        return float(np.mean(found[name])) + (0.0 if name.endswith("x1") else WORTH_MORE_STEPS)

    served = {}
    for method, each in ways.items():
        if each:
            served[method] = min(each[min(each, key=rank)], key=lambda s: s.nll)
    return served, found


Ways = dict[str, list[Served]]


def singles(todo: Sequence[Run], networks: Mapping[str, BridgeNetwork], validation: Validation) -> Ways:
    """One network: every kind at one evaluation, and a bridge also at all its steps."""
    ways: Ways = {}
    for run in (r for r in todo if r.kind in DIRECT):
        network = networks[run.name]
        for evaluations in sorted({1, network.config.steps}):
            score = validation.score({run.name: network}, evaluations)
            ways.setdefault(f"{run.kind} x{evaluations}", []).append(score)
    return ways


def several(
    recipe: BridgeRecipe, todo: Sequence[Run], networks: Mapping[str, BridgeNetwork], validation: Validation
) -> Ways:
    """Pairs that share the teachers, with and without the source counted once, and pairs that each learned from all."""
    m, n = len(recipe.pair_teachers), len(recipe.pair_teachers[0])
    ways: Ways = {}
    for kind in PAIRS:
        for source_weight in (0.0, (m - 1) / (m * n)):
            ways |= mixtures(kind, source_weight, todo, networks, validation)
    for kind in DIRECT:
        names = [run.name for run in todo if run.kind == kind]
        for first, second in zip(names, names[1:] + names[:1], strict=True) if len(names) > 2 else ():
            score = validation.score({name: networks[name] for name in (first, second)})
            ways.setdefault(f"two {kind} x1", []).append(score)
    return ways


def mixtures(
    kind: str, source_weight: float, todo: Sequence[Run], networks: Mapping[str, BridgeNetwork], validation: Validation
) -> Ways:
    """The networks of one kind and seed together, for every seed."""
    by_seed: dict[int, dict[str, BridgeNetwork]] = {}
    for run in (r for r in todo if r.kind == kind):
        by_seed.setdefault(run.seed, {})[run.name] = networks[run.name]
    label = f"{kind}, source weight {source_weight:.2f} x1"
    return {label: [validation.score(each, 1, source_weight) for each in by_seed.values()]} if by_seed else {}


def write_bridge(
    folder: Path,
    recipe: BridgeRecipe,
    ensemble: Mapping[str, Any],
    todo: Sequence[Run],
    networks: Mapping[str, BridgeNetwork],
    served: Mapping[str, Served],
) -> str:
    """Write a bridge folder, tied to the exact weights of its source; returns its digest."""
    source = ensemble["members"][0]
    about = {
        run.name: {"kind": run.kind, "seed": run.seed, "network": vars(networks[run.name].config)}
        | ({"teachers": list(run.teachers)} if run.curve is None else {"curve": [0, run.curve]})
        for run in todo
    }
    config = {
        "kind": "bridge",
        "name": recipe.name,
        "backbone": "bridge",
        "ensemble": recipe.ensemble,
        "source": {
            "file": source,
            "sha256": ensemble["files"][source],
            "network": ensemble["network"],
            "tap": "first",
        },
        "softening": TEMPERATURE,
        "networks": about,
        "serve": {method: entry.entry() for method, entry in served.items()},
    }
    return write_model(folder, config, {f"{name}.safetensors": n.state_dict() for name, n in networks.items()})
