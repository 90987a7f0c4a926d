"""Train a class-conditional diffusion transformer: variance preserving, cosine, v-prediction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.dit import DiTConfig
from models.backbones.interface import Backbone
from models.backbones.uvit import UViTConfig
from models.registry import BACKBONES, resolve
from models.training.loop import Optim, Trained, train
from models.training.recipe import RecipeError, build
from models.training.session import HERE, Session, half

CPU = torch.device("cpu")
Shape = DiTConfig | UViTConfig
SHAPES: Mapping[str, type[DiTConfig] | type[UViTConfig]] = {"dit": DiTConfig, "uvit": UViTConfig}


@dataclass(frozen=True)
class DiffusionRecipe:
    """`offramp train diffusion`: data, network, objective, optimizer, and how the model is sampled by default.

    `network` is the shape of a `backbone`, dit or uvit. `flip`: half of the images are mirrored.
    """

    name: str
    labels: list[str]
    optim: Optim
    network: Shape = field(default_factory=DiTConfig)
    label_dropout: float = 0.1
    logit_normal: float = 0.8
    bf16: bool = True
    seed: int = 0
    solver: str = "dpmpp_2m"
    steps: int = 20
    guidance: float = 2.0
    backbone: str = "dit"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.backbone not in SHAPES:
            raise RecipeError(f"{self.name}: backbone must be {' or '.join(SHAPES)}, got {self.backbone!r}")
        shape = SHAPES[self.backbone]
        if isinstance(self.network, dict):  # as the recipe's file has it
            object.__setattr__(self, "network", build(shape, self.network, f"{self.name}: network"))
        if not isinstance(self.network, shape):
            raise RecipeError(f"{self.name}: network must be a table with the shape of a {self.backbone}")

    def make(self) -> Backbone:
        """The network, its weights drawn now."""
        made: Backbone = resolve(BACKBONES, self.backbone).from_config(dataclasses.asdict(self.network))
        return made


def to_states(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def sample_times(n: int, logit_normal: float, device: torch.device = CPU) -> Tensor:
    """Diffusion times (n,) in (0, 1): a share from logit-normal(0, 1), the rest uniform, stratified."""
    uniform = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    peaked = torch.sigmoid(torch.randn(n, device=device))
    chosen = torch.rand(n, device=device) < logit_normal
    return torch.where(chosen, peaked, uniform[torch.randperm(n, device=device)])


def perturb(x0: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Noised state and its v target: alpha = cos(pi u / 2), sigma = sin(pi u / 2), v = alpha e - sigma x0."""
    alpha, sigma = (f(0.5 * math.pi * u)[:, None, None, None] for f in (torch.cos, torch.sin))
    noise = torch.randn_like(x0)
    return alpha * x0 + sigma * noise, alpha * noise - sigma * x0


def model_config(
    name: str, labels: list[str], network: Shape, description: str, backbone: str = "dit"
) -> dict[str, object]:
    """config.json of a generator, less its files."""
    return {
        "kind": "generator",
        "name": name,
        "description": description,
        "backbone": backbone,
        "network": dataclasses.asdict(network),
        "process": {"prediction": "v", "clip": 1.0},
        "labels": labels,
    }


class Batches:
    """Random minibatches of (states, labels), drawn on a device that holds all images as uint8.

    Labels are dropped to the null label now and then; with `flip`, half of the images are mirrored.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        null: int,
        drop: float,
        *,
        flip: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.images, self.labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
        self.null, self.drop, self.flip, self.device = null, drop, flip, device

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` rows with replacement: states (n, C, H, W), labels (n,)."""
        rows = torch.randint(len(self.labels), (n,), device=self.device)
        labels = torch.where(torch.rand(n, device=self.device) < self.drop, self.null, self.labels[rows])
        states = to_states(self.images[rows])
        if self.flip:
            mirrored = torch.rand(n, 1, 1, 1, device=self.device) < 0.5
            states = torch.where(mirrored, states.flip(3), states)
        return states, labels


def train_diffusion(
    recipe: DiffusionRecipe,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    out: Path,
    session: Session = HERE,
) -> Trained:
    """Full depth, mean squared v error. Returns the averaged network."""
    torch.manual_seed(recipe.seed)
    device = session.device
    model = recipe.make().to(device)
    batches = Batches(images, labels, model.null_label, recipe.label_dropout, flip=recipe.flip, device=device)
    n, full = recipe.optim.batch, [model.depth] * recipe.optim.batch

    def loss(step: int) -> Tensor:
        x0, y = batches.draw(n)
        u = sample_times(n, recipe.logit_normal, device)
        x, v = perturb(x0, u)
        with half(device, recipe.bf16):
            guess, _ = model(x, model.condition(u, y), full)
        return (guess.float() - v).square().mean()

    return train(model, recipe.optim, loss, out, label="diffusion", session=session)
