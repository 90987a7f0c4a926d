"""Diffusion transformer with a depth per row.

Architecture: Peebles & Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023): adaLN-Zero
blocks, fixed 2-D sin-cos positions. Exits: Moon et al. (ICML 2024): a row leaves after its own
number of blocks and goes through the shared, unchanged head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.api import UserError
from models.backbones.interface import Backbone


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. The defaults after `time_features` are fashion-dit's; imported checkpoints differ.

    Attributes:
        classes: real labels; index `classes` is the null label of guidance.
        time_scale: takes the network's time argument to the 0..1000 that its sinusoids expect.
        freq_shift: the last sinusoid has period 10000^((half - 1) / (half - freq_shift)).
        mlp_norm_eps: epsilon of the norm before each MLP; the other norms have 1e-6.
        positions: whether the first half of the position table counts rows or columns.
        learned_variance: the head gives 2 C channels, the second half the learned variance.
        block_embedders: every block embeds time and label with weights of its own; the head takes block 0's.
    """

    image_size: int = 28
    channels: int = 1
    patch: int = 4
    width: int = 128
    depth: int = 8
    heads: int = 4
    classes: int = 10
    mlp_ratio: int = 4
    time_features: int = 128
    time_scale: float = 1000.0
    freq_shift: float = 0.0
    mlp_norm_eps: float = 1e-6
    positions: Literal["rows", "columns"] = "rows"
    learned_variance: bool = False
    block_embedders: bool = False

    def __post_init__(self) -> None:
        if self.positions not in ("rows", "columns"):
            raise UserError(f"network positions must be rows or columns, got {self.positions!r}")


def sincos_2d(width: int, side: int, first: str = "rows") -> Tensor:
    """Fixed 2-D sine-cosine position table, (side*side, width)."""
    quarter = width // 4
    freq = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    pos = torch.arange(side, dtype=torch.float64)[:, None] * freq
    axis = torch.cat([pos.sin(), pos.cos()], dim=1)
    rows = axis[:, None, :].expand(side, side, -1)
    cols = axis[None, :, :].expand(side, side, -1)
    halves = [rows, cols] if first == "rows" else [cols, rows]
    return torch.cat(halves, dim=2).reshape(side * side, width).float()


def time_features(t: Tensor, dim: int, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids of time: t (N,), 0..1000 -> (N, dim), cosines first."""
    half = dim // 2
    freq = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / (half - freq_shift))
    angle = t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) scaled and shifted per row by (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, both modulated (adaLN). Six modulation vectors per row come from outside."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=mlp_norm_eps)
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


class Embedder(nn.Module):
    """Time and label to the vector that modulates a block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.time1 = nn.Linear(config.time_features, config.width)
        self.time2 = nn.Linear(config.width, config.width)
        self.labels = nn.Embedding(config.classes + 1, config.width)


def embedded(embedder: Embedder | DiT, features: Tensor, label: Tensor) -> Tensor:
    """features (N, F) of time, label (N,) -> (N, D)."""
    time = embedder.time2(F.silu(embedder.time1(features)))
    return F.silu(time + embedder.labels(label))


class DiT(Backbone):
    """Noise-conditional transformer. `condition` first (one-token work), then `forward` (tokens)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.depth, self.null_label, self.learned_variance = c.depth, c.classes, c.learned_variance
        self.ranks = tuple(range(c.depth))
        self.row_shape = (c.channels, c.image_size, c.image_size)
        self.side = c.image_size // c.patch
        self.embed = nn.Linear(c.channels * c.patch**2, c.width)
        self.time1 = nn.Linear(c.time_features, c.width)
        self.time2 = nn.Linear(c.width, c.width)
        self.labels = nn.Embedding(c.classes + 1, c.width)
        own = c.depth - 1 if c.block_embedders else 0
        self.embedders = nn.ModuleList(Embedder(c) for _ in range(own))
        self.modulation = nn.ModuleList(nn.Linear(c.width, 6 * c.width) for _ in range(c.depth))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio, c.mlp_norm_eps) for _ in range(c.depth))
        self.head_modulation = nn.Linear(c.width, 2 * c.width)
        self.head_norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(c.width, (2 if c.learned_variance else 1) * c.channels * c.patch**2)
        self.register_buffer("positions", sincos_2d(c.width, self.side, c.positions), persistent=False)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for zero in [*self.modulation, self.head_modulation, self.head]:
            nn.init.zeros_(zero.weight)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """Build from the `network` table of a config.json."""
        return cls(DiTConfig(**network))

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """Every block's modulation: t (N,), label (N,) int64 -> (N, (6 depth + 2) D)."""
        config = self.config
        features = time_features(t * config.time_scale, config.time_features, config.freq_shift)
        first = embedded(self, features, label)
        per_block = [first, *(embedded(e, features, label) for e in self.embedders)]  # type: ignore[arg-type]
        if not config.block_embedders:
            per_block *= self.depth
        parts = [layer(c) for layer, c in zip(self.modulation, per_block, strict=True)]
        return torch.cat([*parts, self.head_modulation(first)], dim=1)

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """States (N, C, H, W) -> tokens (N, T, D) with their positions."""
        return (self.embed(self.patchify(x)) + self.positions,)

    def block(self, index: int, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Block `index`, with its six modulation vectors."""
        six = 6 * self.config.width
        out: Tensor = self.blocks[index](hidden, condition[:, index * six : (index + 1) * six])
        return out

    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """The shared head of every exit: (N, T, D) -> (N, C or 2 C, H, W)."""
        shift, scale = condition[:, self.depth * 6 * self.config.width :].chunk(2, dim=1)
        return self.unpatchify(self.head(modulate(self.head_norm(hidden), shift, scale)))

    def frozen_in_exits(self) -> list[nn.Module]:
        """The time embedder."""
        return [module for e in (self, *self.embedders) for module in (e.time1, e.time2)]

    def patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C p p)."""
        n, c, p, s = x.shape[0], self.config.channels, self.config.patch, self.side
        return x.view(n, c, s, p, s, p).permute(0, 2, 4, 1, 3, 5).reshape(n, s * s, c * p * p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, C p p) -> (N, C, H, W), of as many channels as there are."""
        n, p, s = x.shape[0], self.config.patch, self.side
        c = x.shape[2] // p**2
        return x.view(n, s, s, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, c, s * p, s * p)
