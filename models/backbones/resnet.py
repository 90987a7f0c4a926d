"""Residual classifier with a tap: `tap` (stem and first block) feeds both the rest and the bridges.

He et al., "Deep Residual Learning" (CVPR 2016), basic blocks; BatchNorm-ReLU, or FRN-Swish, which needs no batch
statistics. The tap is the output of the first residual block, as in Kim et al., "Fast Ensembling with Diffusion
Schroedinger Bridge" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.api import UserError


class FilterResponseNorm(nn.Module):
    """Filter Response Normalization and its thresholded linear unit, float32 whatever comes in.

    Every channel is divided by its root mean square over the image, scaled and shifted, then cut off below at a learned
    threshold. Singh & Krishnan, "Filter Response Normalization Layer" (CVPR 2020), equations 1-4.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        scale, shift, threshold = (p[:, None, None] for p in (self.weight, self.bias, self.threshold))
        power = x.float().square().mean((2, 3), keepdim=True)
        return torch.maximum(x * (scale * torch.rsqrt(power + self.eps)) + shift, threshold)


NORMS: Mapping[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "frn": FilterResponseNorm}
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "swish": F.silu}


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a member. Three stages of `blocks` basic blocks, widths w, 2w, 4w.

    `stem`: its channels, 0 for `width`. `bias`: of the convolutions. `he_normal`: convolutions start as He et al.
    (ICCV 2015), otherwise as torch has it. `mean`, `std`: of pixels in [0, 1], one number or one per channel.
    Raises UserError when a name or a number of channels does not fit.
    """

    channels: int = 1
    classes: int = 10
    width: int = 24
    blocks: int = 1
    stem_stride: int = 2
    mean: float | Sequence[float] = 0.286
    std: float | Sequence[float] = 0.353
    stem: int = 0
    norm: str = "batch"
    activation: str = "relu"
    bias: bool = False
    he_normal: bool = False

    def __post_init__(self) -> None:
        for field, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, field) not in known:
                raise UserError(f"network {field} must be one of {', '.join(known)}, got {getattr(self, field)!r}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            if isinstance(value, Sequence) and len(value) != self.channels:
                raise UserError(f"network {field} must be one number or {self.channels}, one per channel, got {value}")


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """Convolution with padding k // 2 on every side."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class BasicBlock(nn.Module):
    """conv-norm-activation-conv-norm, plus a 1x1 shortcut with its norm where the shape changes, activation."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: str = "batch", activation: str = "relu", bias: bool = False
    ) -> None:
        super().__init__()
        normed, self.activation = NORMS[norm], ACTIVATIONS[activation]
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride, bias=bias), normed(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3, bias=bias), normed(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride, bias=bias), normed(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        h = self.activation(self.norm1(self.conv1(x)))
        return self.activation(self.norm2(self.conv2(h)) + self.shortcut(x))


def he_normal(network: nn.Module) -> None:
    """Start every convolution as He et al., "Delving Deep into Rectifiers" (ICCV 2015): fan-in normal, zero bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ResNet(nn.Module):
    """`forward` = `head(features(tap(x)))`. Input: pixels in [0, 1], standardised inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        c = self.config = config
        inputs = c.stem or c.width
        self.register_buffer("mean", torch.tensor(c.mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(c.std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.activation = ACTIVATIONS[c.activation]
        self.stem, self.stem_norm = conv(c.channels, inputs, 3, c.stem_stride, bias=c.bias), NORMS[c.norm](inputs)
        widths = [c.width, 2 * c.width, 4 * c.width]
        layers: list[nn.Module] = []
        for stage, outputs in enumerate(widths):
            for block in range(c.blocks):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(inputs, outputs, stride, c.norm, c.activation, c.bias))
                inputs = outputs
        self.first, self.rest = layers[0], nn.Sequential(*layers[1:])
        self.fc = nn.Linear(inputs, c.classes)
        if c.he_normal:
            he_normal(self)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        return cls(ResNetConfig(**network))

    def tap(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> first block's output (N, width, H', W')."""
        x = (x - self.mean) / self.std
        return self.first(self.activation(self.stem_norm(self.stem(x))))

    def features(self, tap: Tensor) -> Tensor:
        """Tap -> pooled features (N, 4 width)."""
        return self.rest(tap).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, C, H, W) in [0, 1] -> logits (N, K)."""
        return self.fc(self.features(self.tap(x)))
