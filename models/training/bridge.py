"""Train Diffusion Bridge Networks from a transfer cache built once for all of them.

Kim et al. (ICLR 2024). No labels are used. The transfer set is the training images, shifted, half of them
mixed up (Zhang et al., ICLR 2018): where members agree there is nothing to learn, so images off the members'
own training set carry the signal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.backbones.resnet import ResNet
from models.bridge.process import TEMPERATURE, sample_between, sample_temperature, source, target
from models.tasks.classifier import to_pixels
from models.training.data import Images
from models.training.loop import Optim, Trained, train
from models.training.members import random_shift


@dataclass(frozen=True)
class BridgeRecipe:
    """`offramp train bridge`. `ensemble` names the model whose member 1 is the source.

    `passes` over the images make the transfer set: shifted by up to `shift` pixels, a share mixed up.
    `seeds` bridges are trained, and as many direct regressors beside them.
    """

    name: str
    ensemble: str
    optim: Optim
    network: BridgeConfig = field(default_factory=BridgeConfig)
    passes: int = 3
    shift: int = 2
    mixup_share: float = 0.5
    mixup_alpha: float = 0.4
    seeds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Cache:
    """Taps of the source (N, C, H, W) float16 and every member's logits (N, M, K)."""

    taps: Tensor
    logits: Tensor


def perturbed(images: Images, recipe: BridgeRecipe) -> Tensor:
    """One pass over the images: shifted, a share mixed up pairwise; (N, C, H, W) in [0, 1]."""
    x = random_shift(to_pixels(images), recipe.shift)
    n = len(x)
    share = torch.distributions.Beta(recipe.mixup_alpha, recipe.mixup_alpha).sample((n,))
    weight = torch.where(torch.rand(n) < recipe.mixup_share, share, torch.ones(n))[:, None, None, None]
    return weight * x + (1 - weight) * x[torch.randperm(n)]


@torch.inference_mode()
def build_cache(members: list[ResNet], images: Images, recipe: BridgeRecipe, path: Path) -> Cache:
    """Build the transfer cache, or read it when `path` exists."""
    if path.is_file():
        tensors = load_file(path)
        return Cache(tensors["taps"], tensors["logits"])
    torch.manual_seed(recipe.seed + 77)
    taps, logits = [], []
    for _ in range(recipe.passes):
        for x in perturbed(images, recipe).split(1000):
            tap = members[0].tap(x)
            first = members[0].fc(members[0].features(tap))
            taps.append(tap.half())
            logits.append(torch.stack([first, *(m(x) for m in members[1:])], 1))
    cache = Cache(torch.cat(taps), torch.cat(logits))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"taps": cache.taps, "logits": cache.logits}, path)
    return cache


def train_bridge(recipe: BridgeRecipe, cache: Cache, out: Path, seed: int, label: str) -> Trained:
    """One bridge: mean over rows of |Z_0_hat - Z_0|^2 / tau, every step n in 1..T drawn."""
    torch.manual_seed(seed)
    model = BridgeNetwork(recipe.network)
    goal, steps, n = target(cache.logits), recipe.network.steps, recipe.optim.batch

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(goal), (n,))
        z0, z1 = goal[rows], source(cache.logits[rows, 0], sample_temperature(n))
        at = torch.randint(1, steps + 1, (n,))
        tau = (at / steps)[:, None]
        z = sample_between(z0, z1, tau)
        estimate = z - tau * model(cache.taps[rows].float(), z, at)
        return ((estimate - z0).square().sum(1, keepdim=True) / tau).mean()

    return train(model, recipe.optim, loss, out, label=label)


def train_regressor(recipe: BridgeRecipe, cache: Cache, out: Path, seed: int, label: str) -> Trained:
    """The baseline of the same size: Z_0 regressed from tap and softened source in one shot, squared error."""
    torch.manual_seed(seed)
    model = BridgeNetwork(dataclasses.replace(recipe.network, steps=1))
    goal, n = target(cache.logits), recipe.optim.batch

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(goal), (n,))
        z1, one = source(cache.logits[rows, 0], TEMPERATURE), torch.ones(n, dtype=torch.int64)
        estimate = z1 - model(cache.taps[rows].float(), z1, one)
        return (estimate - goal[rows]).square().sum(1).mean()

    return train(model, recipe.optim, loss, out, label=label)


def choose_logits(
    recipe: BridgeRecipe, cache: Cache, out: Path, validate: Callable[[dict[str, nn.Module]], float]
) -> tuple[BridgeConfig, dict[str, float]]:
    """Whether the bridge sees the source's logits: both ways with the first seed, the better on validation.

    `validate` gives the calibrated NLL of a network. Also returns both figures.
    """
    seed, found = recipe.seed + 1, {}
    for logits in (False, True):
        network = dataclasses.replace(recipe.network, logits=logits)
        label = run_label("bridge", seed, network)
        run = train_bridge(dataclasses.replace(recipe, network=network), cache, out / label, seed, label)
        found[network] = validate({"bridge": run.ema})
    best = min(found, key=lambda network: found[network])
    return best, {f"logits={network.logits}".lower(): value for network, value in found.items()}


def run_label(kind: str, seed: int, network: BridgeConfig) -> str:
    """Folder of one run."""
    return f"{kind}-{seed}" + ("-logits" if network.logits else "")


def train_all(recipe: BridgeRecipe, cache: Cache, out: Path) -> dict[str, Trained]:
    """Bridges and regressors of the same size for every seed; runs that are there already are read."""
    trained = {}
    for seed in range(recipe.seed + 1, recipe.seed + 1 + recipe.seeds):
        for kind, run in (("bridge", train_bridge), ("mse", train_regressor)):
            label = run_label(kind, seed, recipe.network)
            trained[f"{kind}-{seed}"] = run(recipe, cache, out / label, seed, label)
    return trained


def summary(done: Trained) -> dict[str, Any]:
    """What the JSON line says of one run."""
    return {"loss": float(np.round(done.loss, 5)), "seconds": round(done.seconds, 1), "steps": done.steps}
