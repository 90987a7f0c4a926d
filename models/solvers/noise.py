"""Counter-based Gaussian noise keyed (seed, evaluation): the same for a row alone or in any batch.

splitmix64 (Steele et al., OOPSLA 2014) on 64-bit integers, then Box-Muller in float64. int64 arithmetic
wraps, which is what the generator wants; torch shifts are arithmetic, so the sign bits are masked off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX1 = 0xBF58476D1CE4E5B9 - 2**64
MIX2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 tensors."""
    x = (x ^ _shift(x, 30)) * MIX1
    x = (x ^ _shift(x, 27)) * MIX2
    return x ^ _shift(x, 31)


def normal(seeds: Tensor, evaluations: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise.

    Args:
        seeds: (N,) int64 image seeds; evaluations: (N,) int64, -1 for the initial noise.
        shape: shape of one row.

    Returns:
        (N, *shape) float32.
    """
    key = mix(mix(seeds + GOLDEN) ^ mix((evaluations + 2) * GOLDEN))
    counter = torch.arange(1, math.prod(shape) + 1, device=seeds.device) * GOLDEN
    bits = mix(key[:, None] + counter)
    radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 32) + 1).double() / 2.0**32))
    angle = (2.0 * math.pi / 2.0**32) * (bits & 0xFFFFFFFF).double()
    return (radius * torch.cos(angle)).float().view(-1, *shape)
