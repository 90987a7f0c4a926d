"""The light network of a Diffusion Bridge: inverted residuals on the source's tap.

Kim et al. (ICLR 2024); blocks after Sandler et al., "MobileNetV2" (CVPR 2018). It predicts
u = (Z_tau - Z_0) / tau, the well-scaled form of the paper's target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import conv


@dataclass(frozen=True)
class BridgeConfig:
    """Shape of a bridge. `steps` is T: one learned time vector per step 1..T.

    `features` > 0: the source's pooled features, that wide, are fed too, and alone where `tap_channels` is 0.
    `expands`: an inverted residual's expansion; 0 is one plain 3x3 convolution, dearer in MACs and faster on a CPU.
    `outputs` > 0: so many instead of `classes`.
    """

    tap_channels: int = 24
    classes: int = 10
    steps: int = 5
    logits: bool = False
    features: int = 0
    outputs: int = 0
    stem_stride: int = 2
    widths: tuple[int, ...] = (24, 36, 48, 72)
    strides: tuple[int, ...] = (1, 2, 1, 1)
    expands: tuple[int, ...] = (2, 3, 3, 3)


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project, each with BatchNorm; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.body = nn.Sequential(
            conv(inputs, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        h = self.body(x)
        return x + h if self.residual else h


class PlainBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU6; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        h = F.relu6(self.norm(self.conv(x)))
        return x + h if self.residual else h


class BridgeNetwork(nn.Module):
    """(tap, Z_tau, step) -> u. `steps` = T; step T is the source end."""

    def __init__(self, config: BridgeConfig) -> None:
        super().__init__()
        c = self.config = config
        if not c.tap_channels and not c.features:
            raise ValueError("a bridge needs tap_channels or features, both are 0")
        inputs = [c.tap_channels, *c.widths[:-1]] if c.tap_channels else []
        shapes = zip(inputs, c.widths, c.strides, c.expands, strict=True) if inputs else ()
        last = c.widths[-1]
        if inputs:
            self.stem, self.stem_norm = conv(inputs[0], inputs[0], 3, c.stem_stride), nn.BatchNorm2d(inputs[0])
            self.mix, self.mix_norm = conv(last, last, 1), nn.BatchNorm2d(last)
        self.blocks = nn.ModuleList(InvertedResidual(i, o, s, e) if e else PlainBlock(i, o, s) for i, o, s, e in shapes)
        self.time = nn.ModuleList(nn.Embedding(c.steps + 1, i) for i in inputs)
        self.logits = nn.ModuleList(nn.Linear(c.classes, i) for i in inputs) if c.logits else None
        self.late = nn.Linear(c.features, last) if c.features else None
        self.fc = nn.Linear(last, c.outputs or c.classes)
        for table in self.time:
            nn.init.zeros_(table.weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items()}
        return cls(BridgeConfig(**shape))

    def forward(self, tap: Tensor, z: Tensor, step: Tensor, features: Tensor | None = None) -> Tensor:
        """tap (N, C, H, W), z (N, K) centred logits, step (N,) int64 in 1..T, features (N, F) -> u (N, K)."""
        pooled = self.convolved(tap, z, step) if self.blocks else torch.zeros(())
        if self.late is not None:
            assert features is not None
            pooled = F.relu6(pooled + self.late(features))
        return self.fc(pooled)

    def convolved(self, tap: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """What the blocks make of the tap, pooled (N, widths[-1])."""
        x = F.relu6(self.stem_norm(self.stem(tap)))
        for i, block in enumerate(self.blocks):
            shift = self.time[i](step)
            if self.logits is not None:
                shift = shift + self.logits[i](z / 3.0)
            x = block(x + shift[:, :, None, None])
        return F.relu6(self.mix_norm(self.mix(x))).mean(dim=(2, 3))
