"""U-ViT with a depth per row.

Architecture: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (CVPR 2023). Time and label are
tokens; every encoder block sends its output to a decoder block over a long skip. Exits: Moon et al. (ICML 2024): a
row may skip the attention and MLP of decoder blocks, never their skip linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.api import UserError
from models.backbones.dit import time_features
from models.backbones.interface import Backbone, Segment


@dataclass(frozen=True)
class UViTConfig:
    """Shape of a U-ViT.

    Attributes:
        depth: all blocks, odd: encoder, one in the middle, as many in the decoder as in the encoder.
        classes: real labels; index `classes` is the null label of guidance. 0: unconditional, no label token.
        time_mlp: a two-layer MLP on the time token.
        conv: a 3x3 convolution after the linear head.
        time_scale, time_offset: the sinusoids see `t * time_scale + time_offset`.
        drop_order: the end of the decoder whose blocks a shallower row loses first.
    """

    image_size: int = 32
    channels: int = 3
    patch: int = 2
    width: int = 512
    depth: int = 13
    heads: int = 8
    classes: int = 0
    mlp_ratio: int = 4
    qkv_bias: bool = False
    time_mlp: bool = False
    conv: bool = True
    time_scale: float = 1.0
    time_offset: float = 0.0
    drop_order: Literal["output", "middle"] = "output"

    def __post_init__(self) -> None:
        if self.depth < 3 or self.depth % 2 == 0:
            raise UserError(f"network depth counts encoder, middle and decoder: an odd number from 3, got {self.depth}")
        if self.drop_order not in ("output", "middle"):
            raise UserError(f"network drop_order must be output or middle, got {self.drop_order!r}")


class Block(nn.Module):
    """Pre-norm attention and MLP; a decoder block first merges its skip into the tokens."""

    def __init__(self, config: UViTConfig, skip: bool) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        if skip:
            self.skip = nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """x and skip (N, T, D) -> (N, T, D)."""
        out: Tensor = self.skip(torch.cat([x, skip], dim=2))
        return out

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over tokens, (N, T, D) -> (N, T, D)."""
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class RowConv(nn.Conv2d):
    """3x3 convolution, zeros around, as one matmul a row: a row's bits do not depend on its batch."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        n, c, h, w = input.shape
        around = F.pad(input, (1, 1, 1, 1))
        shifted = torch.cat([around[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], dim=1)
        taps = self.weight.permute(0, 2, 3, 1).reshape(1, c, 9 * c).expand(n, -1, -1)
        assert self.bias is not None
        return torch.baddbmm(self.bias.view(1, c, 1), taps, shifted.flatten(2)).view(n, c, h, w)


class UViT(Backbone):
    """Noise-conditional U-shaped transformer; the condition is the tokens that go before the patches."""

    bypasses = True

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder = c.depth // 2
        self.depth, self.always, self.null_label = c.depth, self.encoder + 1, c.classes
        lost_late = range(self.encoder) if c.drop_order == "output" else reversed(range(self.encoder))
        self.ranks = tuple(self.always + i for i in lost_late)
        self.row_shape = (c.channels, c.image_size, c.image_size)
        self.side = c.image_size // c.patch
        self.extras = 2 if c.classes else 1
        self.embed = nn.Linear(c.channels * c.patch**2, c.width)
        hidden = 4 * c.width
        mlp = [nn.Linear(c.width, hidden), nn.SiLU(), nn.Linear(hidden, c.width)] if c.time_mlp else []
        self.time = nn.Sequential(*mlp)
        if c.classes:
            self.labels = nn.Embedding(c.classes + 1, c.width)
        self.positions = nn.Parameter(torch.zeros(self.extras + self.side**2, c.width))
        self.blocks = nn.ModuleList(Block(c, skip=index >= self.always) for index in range(c.depth))
        self.head_norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.channels * c.patch**2)
        if c.conv:
            self.smooth = RowConv(c.channels)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        return cls(UViTConfig(**network))

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """Time token, and the label's before it: t (N,), label (N,) int64 -> (N, extras D)."""
        c = self.config
        time = self.time(time_features(t * c.time_scale + c.time_offset, c.width))
        return torch.cat([self.labels(label), time], dim=1) if c.classes else time

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """Encoder and middle: states (N, C, H, W) -> tokens (N, T, D), and every encoder block's output."""
        tokens = condition.view(len(x), self.extras, self.config.width)
        hidden = torch.cat([tokens, self.embed(self.patchify(x))], dim=1) + self.positions
        skips = []
        for index in range(self.encoder):
            hidden = self.blocks[index](hidden)
            skips.append(hidden)
        return self.blocks[self.encoder](hidden), *skips

    def _merge(self, index: int, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The skip linear of a decoder block; the last encoder block's skip is the first to be used."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block.merge(hidden, kept[self.depth - 1 - index])

    def block(self, index: int, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Decoder block `index`: skip linear, attention and MLP."""
        out: Tensor = self.blocks[index](self._merge(index, hidden, kept))
        return out

    def bypass(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """The skip linears of dropped decoder blocks."""
        for index in range(segment.start, segment.stop):
            hidden = self._merge(index, hidden, kept)
        return hidden

    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """The shared head: (N, T, D) -> (N, C, H, W)."""
        out = self.unpatchify(self.head(self.head_norm(hidden))[:, self.extras :])
        return self.smooth(out) if self.config.conv else out

    def frozen_in_exits(self) -> list[nn.Module]:
        """The time embedder (empty of parameters without `time_mlp`)."""
        return [self.time]

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, side^2, C p p)."""
        n, c, p, s = x.shape[0], self.config.channels, self.config.patch, self.side
        return x.view(n, c, s, p, s, p).permute(0, 2, 4, 1, 3, 5).reshape(n, s * s, c * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, side^2, C p p) -> (N, C, H, W)."""
        n, c, p, s = x.shape[0], self.config.channels, self.config.patch, self.side
        return x.view(n, s, s, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, c, s * p, s * p)
