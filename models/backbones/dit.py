"""Diffusion transformer with a depth per row.

Architecture: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023): adaLN-Zero
blocks, fixed 2-D sin-cos positions. Exits: Moon et al. (ICML 2024): a row leaves after its own
number of blocks and goes through the shared, unchanged head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. `classes` real labels; index `classes` is the null label of guidance."""

    image_size: int = 28
    channels: int = 1
    patch: int = 4
    width: int = 128
    depth: int = 8
    heads: int = 4
    classes: int = 10
    mlp_ratio: int = 4
    time_features: int = 128


def sincos_2d(width: int, side: int) -> Tensor:
    """Fixed 2-D sine-cosine position table, (side*side, width)."""
    quarter = width // 4
    freq = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    pos = torch.arange(side, dtype=torch.float64)[:, None] * freq
    axis = torch.cat([pos.sin(), pos.cos()], dim=1)
    rows = axis[:, None, :].expand(side, side, -1)
    cols = axis[None, :, :].expand(side, side, -1)
    return torch.cat([rows, cols], dim=2).reshape(side * side, width).float()


def time_features(u: Tensor, dim: int) -> Tensor:
    """Sinusoids of diffusion time: u (N,) in [0, 1] -> (N, dim). u is scaled to 0..1000 first."""
    half = dim // 2
    freq = torch.exp(-math.log(10_000.0) * torch.arange(half, device=u.device) / half)
    angle = 1000.0 * u[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled and shifted per row by (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, both modulated (adaLN). Six modulation vectors per row come from outside."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, mlp_ratio * width)
        self.fc2 = nn.Linear(mlp_ratio * width, width)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over tokens, (N, T, D) -> (N, T, D)."""
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (N, T, D), modulation (N, 6 D) -> (N, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attend(modulate(self.norm1(x), shift1, scale1))
        hidden = F.gelu(self.fc1(modulate(self.norm2(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.fc2(hidden)


class DiT(nn.Module):
    """Noise-conditional transformer. `condition` first (one-token work), then `forward` (tokens)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.side = c.image_size // c.patch
        self.embed = nn.Linear(c.channels * c.patch**2, c.width)
        self.time1 = nn.Linear(c.time_features, c.width)
        self.time2 = nn.Linear(c.width, c.width)
        self.labels = nn.Embedding(c.classes + 1, c.width)
        self.modulation = nn.ModuleList(nn.Linear(c.width, 6 * c.width) for _ in range(c.depth))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth))
        self.head_modulation = nn.Linear(c.width, 2 * c.width)
        self.head_norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(c.width, c.channels * c.patch**2)
        self.register_buffer("positions", sincos_2d(c.width, self.side), persistent=False)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.labels.weight, std=0.02)
        for zero in [*self.modulation, self.head_modulation, self.head]:
            nn.init.zeros_(zero.weight)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        return cls(DiTConfig(**network))

    @property
    def depth(self) -> int:
        """Blocks of the full network."""
        return self.config.depth

    @property
    def null_label(self) -> int:
        """The label of the unconditional rows of guidance."""
        return self.config.classes

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Shape of one row's state, (C, H, W)."""
        return self.config.channels, self.config.image_size, self.config.image_size

    def condition(self, u: Tensor, label: Tensor) -> Tensor:
        """Every block's modulation: u (N,) in [0, 1], label (N,) int64 -> (N, (6 depth + 2) D)."""
        time = self.time2(F.silu(self.time1(time_features(u, self.config.time_features))))
        c = F.silu(time + self.labels(label))
        parts = [layer(c) for layer in self.modulation]
        return torch.cat([*parts, self.head_modulation(c)], dim=1)

    def forward(self, x: Tensor, modulation: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Run every row to its own depth.

        Args:
            x: states (N, C, H, W), float32.
            modulation: what `condition` returned for the rows, (N, (6 depth + 2) D).
            depths: blocks to run per row, non-increasing (so the rows of a block are a prefix).

        Returns:
            Network output (N, C, H, W), and the number of rows that each block ran on.
        """
        six = 6 * self.config.width
        h = self.embed(self.patchify(x)) + self.positions
        ran: list[int] = []
        left, n = [], len(depths)
        for level, block in enumerate(self.blocks):
            alive = n
            while alive and depths[alive - 1] <= level:
                alive -= 1
            if alive < n:
                left.append(h[alive:])
                h, n = h[:alive], alive
            if not n:
                break
            h = block(h, modulation[:n, level * six : (level + 1) * six])
            ran.append(n)
        h = torch.cat([h, *reversed(left)]) if left else h
        shift, scale = modulation[:, self.depth * six :].chunk(2, dim=1)
        return self.unpatchify(self.head(modulate(self.head_norm(h), shift, scale))), ran

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C p p)."""
        n, c, p, s = x.shape[0], self.config.channels, self.config.patch, self.side
        return x.view(n, c, s, p, s, p).permute(0, 2, 4, 1, 3, 5).reshape(n, s * s, c * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, C p p) -> (N, C, H, W)."""
        n, c, p, s = x.shape[0], self.config.channels, self.config.patch, self.side
        return x.view(n, s, s, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, c, s * p, s * p)
