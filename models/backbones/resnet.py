"""Residual classifier with a tap: `tap` (stem and first block) feeds both the rest and the bridges.

He et al., "Deep Residual Learning" (CVPR 2016), basic blocks, BatchNorm-ReLU. The tap is the output of
the first residual block, as in Kim et al., "Fast Ensembling with Diffusion Schroedinger Bridge" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a member. Three stages of `blocks` basic blocks, widths w, 2w, 4w."""

    channels: int = 1
    classes: int = 10
    width: int = 24
    blocks: int = 1
    stem_stride: int = 2
    mean: float = 0.286
    std: float = 0.353


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Bias-free convolution, padding k // 2 on every side."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus a 1x1 shortcut where the shape changes, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """`forward` = `head(features(tap(x)))`. Input: pixels in [0, 1], standardised inside."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        c = self.config = config
        self.stem, self.stem_norm = conv(c.channels, c.width, 3, c.stem_stride), nn.BatchNorm2d(c.width)
        widths = [c.width, 2 * c.width, 4 * c.width]
        layers: list[nn.Module] = []
        inputs = c.width
        for stage, outputs in enumerate(widths):
            for block in range(c.blocks):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.first, self.rest = layers[0], nn.Sequential(*layers[1:])
        self.fc = nn.Linear(inputs, c.classes)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        return cls(ResNetConfig(**network))

    def tap(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> first block's output (N, width, H', W')."""
        x = (x - self.config.mean) / self.config.std
        return self.first(F.relu(self.stem_norm(self.stem(x))))

    def features(self, tap: Tensor) -> Tensor:
        """Tap -> pooled features (N, 4 width)."""
        return self.rest(tap).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> logits (N, K)."""
        return self.fc(self.features(self.tap(x)))
