"""Exit heads that learn the ensemble's answers, and when to leave: what `offramp train heads` does.

No labels are used but those of validation: thresholds for a stated mean cost, temperatures, and the seed to serve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.early_exits import ExitHeads, count
from models.backbones.resnet import ResNet
from models.store import write_model
from models.tasks.classifier import to_pixels
from models.training.data import Split
from models.training.heads import Exits, HeadsRecipe, pooled_stages, train_heads
from models.training.loop import Optim
from models.training.recipe import RecipeError
from models.training.transfer import Cache, Transfer
from models.uncertainty.early_exit import (
    Curve,
    Floats,
    choose_confidences,
    confidences,
    mixture,
    own_losses,
    route,
    temperatures_by_exit,
)
from models.uncertainty.scores import fit_temperature, log_softmax, soften


@dataclass(frozen=True)
class ExitHeadsRecipe:
    """`offramp train heads`. `ensemble` names the model whose member 1 is the source and whose mean answer is learned.

    Heads have `hidden` units on grid x grid fields. `cost`: mean MACs of an image relative to the source, at most.
    """

    name: str
    ensemble: str
    optim: Optim
    transfer: Transfer = field(default_factory=Transfer)
    grid: int = 4
    hidden: int = 128
    cost: float = 0.6
    seeds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Leaving:
    """When rows leave some heads, and what that is worth on validation: shares (3,) by exit, mean cost, NLL."""

    thresholds: tuple[float, float]
    confidence_temperatures: tuple[float, ...]
    temperatures: tuple[float, ...]
    shares: tuple[float, ...]
    cost: float
    nll: float

    def entry(self) -> dict[str, Any]:
        """As config.json has it; null for an infinite threshold."""
        limits = [limit if math.isfinite(limit) else None for limit in self.thresholds]
        kept = ("confidence_temperatures", "temperatures", "shares")
        return {"thresholds": limits} | {key: list(getattr(self, key)) for key in kept}


class Validation:
    """The selection split behind the stages of one source; `pooled` by grid, run once."""

    def __init__(self, source: ResNet, split: Split) -> None:
        self.source, self.split, self.pixels = source, split, to_pixels(split.images)
        self.pooled: dict[int, list[Tensor]] = {}

    @torch.inference_mode()
    def leaving(self, heads: ExitHeads, budget: float) -> Leaving:
        """The likeliest way to leave whose mean cost is at most `budget`; the third head answers last.

        Raises:
            RecipeError: nothing costs so little, or nothing is better than the whole source.
        """
        if heads.grid not in self.pooled:
            self.pooled[heads.grid] = pooled_stages(self.source, heads, self.pixels)
        pooled, labels, macs = self.pooled[heads.grid], self.split.labels, count(self.source, heads, self.pixels[:1])
        pairs = zip(heads.heads, pooled, strict=True)
        answers = [log_softmax(head(p).double().numpy()) for head, p in pairs]
        heat = [fit_temperature(log_p, labels) for log_p in answers]
        losses = [own_losses(soften(log_p, t), labels) for log_p, t in zip(answers, heat, strict=True)]

        def costs(first: bool, second: bool) -> Floats:
            return macs.costs([first, second, True])

        curve = Curve(confidences(answers[:2], heat[:2]), np.stack(losses, 1), costs)
        if budget not in (chosen := choose_confidences(curve, [budget])):
            first = costs(True, False)[0]
            raise RecipeError(f"cost: {budget:g} is less than the first exit costs, set {first:.2f} or more")
        limits = chosen[budget]
        if not np.isfinite(limits).any():
            raise RecipeError(f"cost: at {budget:g} it is best that no image leaves early, set less")
        left = route(curve.scores, limits)
        temperatures = temperatures_by_exit(answers, left, labels)
        return Leaving(
            thresholds=limits,
            confidence_temperatures=tuple(heat[:2]),
            temperatures=tuple(temperatures),
            shares=tuple(float((left == k).mean()) for k in range(3)),
            cost=curve.at(limits)[0],
            nll=float(own_losses(mixture(answers, left, temperatures), labels).mean()),
        )


def train_exit_heads(
    recipe: ExitHeadsRecipe, cache: Cache, source: ResNet, validation: Validation, runs: Path
) -> dict[str, tuple[Exits, Leaving]]:
    """Heads of every seed by name, and when rows leave them."""
    made = {}
    pooled, goal = list[Tensor](), cache.logits.softmax(-1).mean(1)
    for seed in range(recipe.seed + 1, recipe.seed + 1 + recipe.seeds):
        torch.manual_seed(seed)
        fresh, name = Exits(source.config, recipe.grid, recipe.hidden), f"heads-{seed}"
        pooled = pooled or pooled_stages(source, fresh, cache.pixels)
        heads = train_heads(fresh, pooled, goal, HeadsRecipe(recipe.optim, seed=seed), runs / name)
        made[name] = heads, validation.leaving(heads, recipe.cost)
    return made


def write_heads(
    folder: Path, recipe: ExitHeadsRecipe, ensemble: Mapping[str, Any], made: Mapping[str, tuple[Exits, Leaving]]
) -> dict[str, Any]:
    """Write an exits folder, tied to the exact weights of its source; validation says which seed is served.

    Returns the summary.
    """
    source, best = ensemble["members"][0], min(made, key=lambda name: made[name][1].nll)
    config = {
        "kind": "exits",
        "name": recipe.name,
        "backbone": "exits",
        "ensemble": recipe.ensemble,
        "source": {"file": source, "sha256": ensemble["files"][source], "network": ensemble["network"]},
        "heads": {"grid": recipe.grid, "hidden": recipe.hidden},
        "networks": {name: leaving.entry() for name, (_, leaving) in made.items()},
        "serve": best,
    }
    files = {f"{name}.safetensors": weights(heads) for name, (heads, _) in made.items()}
    scores = {name: {"nll": found.nll, "cost": found.cost, "shares": found.shares} for name, (_, found) in made.items()}
    return {"model": recipe.name, "weights": write_model(folder, config, files), "serve": best, "validation": scores}


def weights(heads: Exits) -> dict[str, Tensor]:
    """Of the heads without gates."""
    return {key: value for key, value in heads.state_dict().items() if not key.startswith("gates.")}
