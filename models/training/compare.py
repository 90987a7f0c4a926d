"""`offramp train compare`: what a bridge should learn from, see and look like, by validation likelihood.

A study file is a bridge recipe with `arms`: each overrides some of its keys and trains one kind of network with every
seed. Nothing is kept but the table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.backbones.bridge import BridgeNetwork
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet
from models.evaluation.report import markdown
from models.tasks.classifier import load_members, to_pixels
from models.training.bridge import BridgeRecipe, Run, train_run
from models.training.data import Images, Splits
from models.training.recipe import build
from models.training.serving import Validation
from models.training.transfer import cached


@dataclass(frozen=True)
class StudyRecipe:
    """`base` is a bridge recipe's keys; `arms` maps a name to the keys that it changes, and to its `kind`."""

    base: dict[str, Any]
    arms: dict[str, Any] = field(default_factory=dict)
    kind: str = "kl"

    def arm(self, name: str, where: str) -> tuple[str, BridgeRecipe]:
        """The kind that an arm trains, and its recipe; `where` prefixes error messages."""
        changes = dict(self.arms[name])
        kind = changes.pop("kind", self.kind)
        return kind, build(BridgeRecipe, merged(self.base, changes), f"{where}: arm {name}")


@dataclass(frozen=True)
class Arm:
    """One arm's result: calibrated NLL on validation for every seed, MACs relative to the source, seconds trained."""

    name: str
    nll: tuple[float, ...]
    cost: float
    seconds: float

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.nll))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, tables key by key."""
    both = {**base, **changes}
    tables = (key for key in changes if isinstance(base.get(key), dict))
    return both | {key: {**base[key], **changes[key]} for key in tables}


def compare(study: StudyRecipe, ensemble: Path, generator: Path, data: Splits, out: Path, where: str) -> list[Arm]:
    """Train and score every arm; transfer sets and runs that are there already are read."""
    members = load_members(ensemble)
    validation, found = Validation(members[0], data.selection), []
    for name in study.arms:
        kind, recipe = study.arm(name, where)
        cache = cached(recipe.transfer, ensemble, generator, members, data.train.images, out)
        scores, seconds, cost = [], 0.0, 0.0
        for seed in range(recipe.seed + 1, recipe.seed + 1 + recipe.seeds):
            run = Run(f"{name}-{seed}", kind, seed, tuple(range(len(members))))
            done = train_run(run, recipe, cache, out / "runs" / recipe.name)
            assert isinstance(done.ema, BridgeNetwork)
            scores.append(validation.score({run.name: done.ema}).nll)
            seconds, cost = seconds + done.seconds, relative_macs(done.ema, members[0], data.selection.images[:1])
        found.append(Arm(name, tuple(scores), cost, seconds))
        print(f"{name}: {found[-1].mean:.4f}", file=sys.stderr, flush=True)
    return found


def relative_macs(network: BridgeNetwork, source: ResNet, images: Images) -> float:
    """Conv + linear MACs of source and network over the source's."""
    x = to_pixels(images)
    tap = source.tap(x)
    z, one, late = torch.zeros(1, network.config.classes), torch.ones(1, dtype=torch.int64), source.features(tap)
    return 1.0 + count_macs(network, lambda: network(tap, z, one, late)) / count_macs(source, lambda: source(x))


def table(arms: Sequence[Arm]) -> str:
    """Markdown, in the order of the study file."""
    rows = [
        [a.name, f"{a.mean:.4f}", " ".join(f"{v:.4f}" for v in a.nll), f"{a.cost:.3f}", f"{a.seconds:.0f}"]
        for a in arms
    ]
    return markdown(["arm", "cNLL on validation", "each seed", "MACs", "seconds"], rows)
