"""Train a class-conditional diffusion transformer: variance preserving, cosine, v-prediction."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.dit import DiT, DiTConfig
from models.training.loop import Optim, Trained, train


@dataclass(frozen=True)
class DiffusionRecipe:
    """`offramp train diffusion`: data, network, objective, optimizer, and how the model is sampled by default."""

    name: str
    labels: list[str]
    optim: Optim
    network: DiTConfig = field(default_factory=DiTConfig)
    label_dropout: float = 0.1
    logit_normal: float = 0.8
    bf16: bool = True
    seed: int = 0
    solver: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 2.0


def to_states(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def sample_times(n: int, logit_normal: float) -> Tensor:
    """Diffusion times (n,) in (0, 1): a share from logit-normal(0, 1), the rest uniform, stratified."""
    uniform = (torch.arange(n) + torch.rand(n)) / n
    peaked = torch.sigmoid(torch.randn(n))
    return torch.where(torch.rand(n) < logit_normal, peaked, uniform[torch.randperm(n)])


def perturb(x0: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Noised state and its v target: alpha = cos(pi u / 2), sigma = sin(pi u / 2), v = alpha e - sigma x0."""
    alpha, sigma = (f(0.5 * math.pi * u)[:, None, None, None] for f in (torch.cos, torch.sin))
    noise = torch.randn_like(x0)
    return alpha * x0 + sigma * noise, alpha * noise - sigma * x0


def model_config(name: str, labels: list[str], network: DiTConfig, description: str) -> dict[str, object]:
    """config.json of a generator, less its files."""
    return {
        "kind": "generator",
        "name": name,
        "description": description,
        "backbone": "dit",
        "network": dataclasses.asdict(network),
        "process": {"prediction": "v", "clip": 1.0},
        "labels": labels,
    }


class Batches:
    """Random minibatches of (states, labels), labels dropped to the null label now and then."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], null: int, drop: float) -> None:
        self.images, self.labels = images, torch.from_numpy(labels)
        self.null, self.drop = null, drop

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` rows with replacement: states (n, C, H, W), labels (n,)."""
        rows = torch.randint(len(self.labels), (n,))
        labels = torch.where(torch.rand(n) < self.drop, self.null, self.labels[rows])
        return to_states(self.images[rows.numpy()]), labels


def train_diffusion(
    recipe: DiffusionRecipe, images: NDArray[np.uint8], labels: NDArray[np.int64], out: Path
) -> Trained:
    """Full depth, mean squared v error. Returns the averaged network."""
    torch.manual_seed(recipe.seed)
    model = DiT(recipe.network)
    batches = Batches(images, labels, model.null_label, recipe.label_dropout)
    n, full = recipe.optim.batch, [model.depth] * recipe.optim.batch

    def loss(step: int) -> Tensor:
        x0, y = batches.draw(n)
        u = sample_times(n, recipe.logit_normal)
        x, v = perturb(x0, u)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            guess, _ = model(x, model.condition(u, y), full)
        return (guess.float() - v).square().mean()

    return train(model, recipe.optim, loss, out, label="diffusion")
