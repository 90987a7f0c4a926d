"""Train exit heads, and gates that say who leaves there, on the stages of a frozen source.

Regol, Chataoui, Coates, "Jointly-Learned Exit and Inference for a Dynamic Neural Network" (ICLR 2024): gates see how
sure their head is, and heads and gates descend together on expected loss plus lambda times expected cost over the
probabilities of leaving. Here without the paper's bi-level schedule: both descend on that one loss, heads start
trained on all images, and gates do not move heads through their inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.early_exits import ExitHead, ExitHeads, stages
from models.backbones.resnet import ResNet, ResNetConfig
from models.training.loop import Optim, train

STEEP = 10.0  # of gates in their inputs, which differ by little; they learn as much faster


def confidence(logits: Tensor) -> Tensor:
    """What a gate sees of logits (N, K): largest probability, its lead over the second, entropy in nats; (N, 3)."""
    p = logits.softmax(-1)
    top = p.topk(2, -1).values
    entropy = -(p * p.clamp_min(1e-12).log()).sum(-1)
    return torch.stack([top[:, 0], top[:, 0] - top[:, 1], entropy], -1)


def exit_probabilities(gates: Tensor) -> Tensor:
    """Gates (N, E), probability of leaving if still there -> of leaving at each exit or at the end (N, E + 1)."""
    stays = torch.cumprod(1.0 - gates, 1)
    return torch.cat([gates[:, :1], gates[:, 1:] * stays[:, :-1], stays[:, -1:]], 1)


class Exits(ExitHeads):
    """Heads, and a gate per stage but the last."""

    def __init__(self, source: ResNetConfig, grid: int, hidden: int) -> None:
        super().__init__(source, grid, hidden)
        self.gates = nn.ModuleList(nn.Linear(3, 1) for _ in self.heads[1:])
        for parameter in self.gates.parameters():
            nn.init.zeros_(parameter)

    def gate(self, k: int, logits: Tensor) -> Tensor:
        """Probability (N,) of leaving at exit k from its logits (N, K), which get no gradient."""
        probability: Tensor = (STEEP * self.gates[k](confidence(logits.detach())))[:, 0].sigmoid()
        return probability


@dataclass(frozen=True)
class HeadsRecipe:
    """Heads of `hidden` units on grid x grid fields; `joint`: the steps in which gates are learned with them."""

    optim: Optim = Optim(steps=1500, batch=256, lr=2e-3, warmup=50, weight_decay=1e-2, ema=0.99)
    joint: Optim = Optim(steps=500, batch=256, lr=2e-3, warmup=50, weight_decay=1e-2, ema=0.99)
    grid: int = 4
    hidden: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Cache:
    """Pooled stages (3 of (N, inputs)); source logits, the ensemble's mean probability, one-hot labels, each (N, K)."""

    pooled: list[Tensor]
    source: Tensor
    ensemble: Tensor
    labels: Tensor


@torch.inference_mode()
def pooled_stages(source: ResNet, exits: ExitHeads, x: Tensor) -> list[Tensor]:
    """The three stages of pixels (N, C, H, W) as heads see them, (N, inputs) each."""
    parts = []
    for h in x.split(500):
        h, found = h.float(), []
        for stage in stages(source):
            h = stage(h)
            found.append(exits.pool(h))
        parts.append(found)
    return [torch.cat(pooled) for pooled in zip(*parts, strict=True)]


@torch.inference_mode()
def cache(members: Sequence[ResNet], exits: ExitHeads, x: Tensor, labels: NDArray[np.int64]) -> Cache:
    """Run pixels (N, C, H, W) through the source's stages, and through all members for the ensemble's answer."""
    logits = torch.cat([torch.stack([member(h) for member in members], 1) for h in x.split(500)])
    onehot = F.one_hot(torch.from_numpy(labels), logits.shape[-1]).float()
    return Cache(pooled_stages(members[0], exits, x), logits[:, 0], logits.softmax(-1).mean(1), onehot)


def train_heads(exits: Exits, pooled: Sequence[Tensor], goal: Tensor, recipe: HeadsRecipe, out: Path) -> Exits:
    """Every head on every image, pooled stages (N, inputs) each: cross-entropy against `goal` (N, K), labels or the
    ensemble's answer."""
    torch.manual_seed(recipe.seed)
    model = copy.deepcopy(exits)
    for head, part in zip(model.heads, pooled, strict=True):
        assert isinstance(head, ExitHead)
        head.standardise(part)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(goal), (recipe.optim.batch,))
        parts = [F.cross_entropy(head(p[rows]), goal[rows]) for head, p in zip(model.heads, pooled, strict=True)]
        return torch.stack(parts).sum()

    done = train(model, recipe.optim, loss, out, label=out.name, freeze=[model.gates]).ema
    assert isinstance(done, Exits)
    return done


def train_jointly(
    exits: Exits, found: Cache, goal: Tensor, costs: Sequence[float], price: float, recipe: HeadsRecipe, out: Path
) -> Exits:
    """Heads and gates on the expected cross-entropy against `goal` plus `price` times the expected cost.

    Args:
        exits: trained heads.
        found: of images that the source was not trained on.
        goal: labels or the ensemble's answer (N, K).
        costs: of leaving at each stage (3,), relative to the source.
        price: nats that one forward of the source is worth: the paper's lambda.
        recipe: its `joint` steps.
        out: folder of the run.
    """
    torch.manual_seed(recipe.seed)
    model, cost = copy.deepcopy(exits).requires_grad_(True), torch.tensor(costs)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(goal), (recipe.joint.batch,))
        logits = [head(p[rows]) for head, p in zip(model.heads, found.pooled, strict=True)]
        gates = torch.stack([model.gate(k, logits[k]) for k in range(len(model.gates))], 1)
        losses = torch.stack([F.cross_entropy(z, goal[rows], reduction="none") for z in logits], 1)
        return (exit_probabilities(gates) * (losses + price * cost)).sum(1).mean()

    done = train(model, recipe.joint, loss, out, label=f"joint {price:g}").ema
    assert isinstance(done, Exits)
    return done
