"""One fused, branch-free update for every row, whatever its solver (table.py has the formula)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.solvers.table import INDEX


def column(coef: Tensor, name: str) -> Tensor:
    """Coefficient `name` of rows (N, fields), shaped (N, 1, 1, 1)."""
    return coef[:, INDEX[name], None, None, None]


def update(
    coef: Tensor, x: Tensor, s: Tensor, h1: Tensor, h2: Tensor, o: Tensor, z: Tensor, v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance rows by one evaluation.

    Args:
        coef: float32 coefficient rows (N, fields).
        x, s, h1, h2: state and history (N, C, H, W), float32.
        o: network output, guided already; z: standard normal noise; both (N, C, H, W).
        v: learned variance in [-1, 1] (N, C, H, W); rows without it (lv0 = lv1 = 0) pay no heed, to the bit.

    Returns:
        The new (x, s, h1, h2).
    """

    def c(name: str) -> Tensor:
        return column(coef, name)

    m = c("c_x") * x + c("c_o") * o
    m = torch.minimum(torch.maximum(m, -c("clip")), c("clip"))
    y = c("k_x") * x + c("k_m") * m + c("k_1") * h1 + c("k_2") * h2 + c("k_s") * s
    new = c("a_y") * y + c("a_o") * o + c("a_m") * m + c("a_1") * h1 + c("a_2") * h2 + c("a_s") * s
    log_variance = c("lv0") if v is None else c("lv0") + (0.5 * v + 0.5) * (c("lv1") - c("lv0"))
    return new + c("a_n") * torch.exp(0.5 * log_variance) * z, y, m, h1
