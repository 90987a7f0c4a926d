"""Early exits of a residual classifier: its three stages, a light head on each, and what leaving there costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.distance import FeatureDistance
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet, ResNetConfig

STAGES = 3


class Stages(nn.Module):
    """The source's stages `first` .. `last` (counted from 0, both included) in turn; weights are the source's own."""

    def __init__(self, source: ResNet, first: int, last: int) -> None:
        super().__init__()
        blocks = source.config.blocks
        self.source, self.first = source, first
        self.blocks = source.rest[max(first * blocks - 1, 0) : (last + 1) * blocks - 1]

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W), or the output of the stage before -> output of the last stage."""
        h: Tensor = self.blocks(x if self.first else self.source.tap(x))
        return h


def stages(source: ResNet) -> list[Callable[[Tensor], Tensor]]:
    """The source's three stages in turn: pixels (N, C, H, W) -> first, second, third stage's output."""
    return [Stages(source, k, k) for k in range(STAGES)]


class ExitHead(nn.Module):
    """Pooled stage -> standardised -> one hidden layer -> logits."""

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.hidden, self.out = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def standardise(self, pooled: Tensor) -> None:
        """Take mean and deviation (inputs,) from pooled stages (N, inputs)."""
        self.mean.copy_(pooled.mean(0))
        self.scale.copy_(pooled.std(0).clamp_min(1e-3))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, inputs) -> logits (N, K)."""
        return self.out(F.relu(self.hidden((pooled - self.mean) / self.scale)))


class ExitHeads(nn.Module):
    """A head per stage. Stages are averaged over grid x grid fields before the head."""

    def __init__(self, source: ResNetConfig, grid: int, hidden: int) -> None:
        super().__init__()
        self.grid = grid
        widths = [source.width, 2 * source.width, 4 * source.width]
        self.heads = nn.ModuleList(ExitHead(c * grid * grid, hidden, source.classes) for c in widths)

    def pool(self, stage: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C grid^2): means of square fields, the last ones cut off where H / grid is no integer."""
        field = math.ceil(stage.shape[-1] / self.grid)
        return (F.avg_pool2d(stage, field, ceil_mode=True) if field > 1 else stage).flatten(1)


class ExitStage(nn.Module):
    """Stages `first` .. `last` of the source and the head after them; `distance` where they end in the tap."""

    def __init__(
        self, source: ResNet, heads: ExitHeads, first: int, last: int, distance: FeatureDistance | None = None
    ) -> None:
        super().__init__()
        self.stages, self.head, self.pool = Stages(source, first, last), heads.heads[last], heads.pool
        self.distance = distance

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Pixels, or what the exit before left -> the last stage's output (N, C, H, W), logits (N, K), and the
        distance (N,) where there is one."""
        h = self.stages(x)
        far = () if self.distance is None else (self.distance(h),)
        return h, self.head(self.pool(h)), *far


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image: three stages, the head on each, the source's own last layer, and the distance
    of its tap, 0 without one."""

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    last: int
    distance: int = 0

    @property
    def single(self) -> int:
        """One forward of the source, with the distance."""
        return sum(self.stages) + self.last + self.distance

    def costs(self, used: Sequence[bool], end: float = 0.0, start: float = 0.0) -> NDArray[np.float64]:
        """Cost (3,) of leaving at each stage when only heads of `used` stages run.

        An unused third head is the source's own last layer. `start` is what every answer costs on top, `end` the last.
        """
        heads = [h * u for h, u in zip(self.heads, used, strict=True)]
        total = np.cumsum(self.stages) + np.cumsum(heads)
        found: NDArray[np.float64] = total / self.single + start
        found[-1] += (0 if used[-1] else self.last) / self.single + end
        return found


@torch.no_grad()
def count(source: ResNet, exits: ExitHeads, x: Tensor, distance: FeatureDistance | None = None) -> Macs:
    """Count on one image (1, C, H, W)."""
    parts, heads, h = [], [], x
    for stage, head in zip(stages(source), exits.heads, strict=True):
        before = h
        parts.append(count_macs(source, lambda stage=stage, before=before: stage(before)))  # type: ignore[misc]
        h = stage(h)
        heads.append(count_macs(head, lambda head=head, h=h: head(exits.pool(h))))  # type: ignore[misc]
    far = 0 if distance is None else count_macs(distance, lambda: distance(source.tap(x)))
    return Macs(tuple(parts), tuple(heads), source.fc.in_features * source.fc.out_features, far)
