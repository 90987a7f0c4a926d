"""Low-loss curves between ensemble members, and the network in the middle of one.

Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (NeurIPS 2018): a quadratic Bezier
curve w(r) = (1 - r)^2 w_0 + 2 r (1 - r) c + r^2 w_1 whose control point c is trained with r uniform in [0, 1].
Bridge Networks (Yun et al., ICML 2023) learn what the network at r = 1/2 answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from models.training.data import Split
from models.training.loop import Optim, train
from models.training.members import augment, epoch_rows, pixels_of
from models.training.session import HERE, Session, device_of, half


@dataclass(frozen=True)
class CurveRecipe:
    """Curves from the source to the members `ends` (indices), trained on the members' own images."""

    ends: tuple[int, ...] = (1, 2)
    optim: Optim = field(default_factory=lambda: Optim(steps=1250, algorithm="sgd", lr=0.05, ema=0.0, clip=5.0))
    shift: int = 0
    flip: bool = False
    bf16: bool = True


def bezier(start: Tensor, control: Tensor, end: Tensor, r: float) -> Tensor:
    """The point at r in [0, 1] of the quadratic curve."""
    return (1 - r) ** 2 * start + 2 * r * (1 - r) * control + r**2 * end


def at(r: float, start: nn.Module, control: nn.Module, end: nn.Module) -> dict[str, Tensor]:
    """The parameters of the network at r."""
    ends = dict(start.named_parameters()), dict(end.named_parameters())
    return {name: bezier(ends[0][name], c, ends[1][name], r) for name, c in control.named_parameters()}


def train_curve(
    start: ResNet, end: ResNet, split: Split, recipe: CurveRecipe, seed: int, out: Path, session: Session = HERE
) -> ResNet:
    """The network in the middle of a curve trained on `split`, its BatchNorm statistics taken there anew."""
    torch.manual_seed(seed)
    device = device_of(start)
    control = copy.deepcopy(start)
    for own, a, b in zip(control.parameters(), start.parameters(), end.parameters(), strict=True):
        own.data = (a + b) / 2
        own.requires_grad_(True)
    x, y = pixels_of(split.images, device), torch.from_numpy(split.labels).to(device)

    def loss(step: int) -> Tensor:
        rows = epoch_rows(len(y), recipe.optim.batch, step, seed).to(device)
        weights = at(float(torch.rand(())), start, control, end)
        with half(device, recipe.bf16):
            logits = functional_call(control, weights, (augment(x[rows], recipe.shift, recipe.flip),))
        return F.cross_entropy(logits.float(), y[rows])

    trained = train(control, recipe.optim, loss, out, label=out.name, session=session).ema
    middle = copy.deepcopy(start)
    for name, value in at(0.5, start, trained, end).items():
        middle.get_parameter(name).data = value.detach()
    return settled(middle, x)


@torch.no_grad()
def settled(model: ResNet, x: Tensor, batch: int = 500) -> ResNet:
    """The network with BatchNorm statistics averaged over pixels (N, C, H, W), in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for chunk in x.split(batch):
        model(chunk)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def answers(model: ResNet, pixels: Tensor, batch: int = 1000) -> Tensor:
    """Logits (N, K) of float16 pixels (N, C, H, W)."""
    return torch.cat([model(chunk.float()) for chunk in pixels.split(batch)]).clone()


def midpoints(
    members: Sequence[ResNet],
    split: Split,
    pixels: Tensor,
    recipe: CurveRecipe,
    seed: int,
    out: Path,
    session: Session = HERE,
) -> dict[int, Tensor]:
    """Logits (N, K) of every curve's middle over the transfer set, by the index of the curve's end."""
    found = {}
    for end in recipe.ends:
        folder = out / f"curve-to-{end + 1}"
        middle = train_curve(members[0], members[end], split, recipe, seed, folder, session)
        found[end] = answers(middle, pixels)
    return found
