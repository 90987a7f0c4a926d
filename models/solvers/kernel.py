"""One fused, branch-free update for every row, whatever its solver (table.py has the formula)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.solvers.table import INDEX


def column(coef: Tensor, name: str) -> Tensor:
    """Coefficient `name` of rows (N, fields), shaped (N, 1, 1, 1)."""
    return coef[:, INDEX[name], None, None, None]


def update(
    coef: Tensor, x: Tensor, s: Tensor, h1: Tensor, h2: Tensor, o: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance rows by one evaluation.

    Args:
        coef: float32 coefficient rows (N, fields).
        x, s, h1, h2: state and history (N, C, H, W), float32.
        o: network output, guided already; z: standard normal noise; both (N, C, H, W).

    Returns:
        The new (x, s, h1, h2).
    """

    def c(name: str) -> Tensor:
        return column(coef, name)

    m = c("c_x") * x + c("c_o") * o
    m = torch.minimum(torch.maximum(m, -c("clip")), c("clip"))
    y = c("k_x") * x + c("k_m") * m + c("k_1") * h1 + c("k_2") * h2 + c("k_s") * s
    new = c("a_y") * y + c("a_o") * o + c("a_m") * m + c("a_1") * h1 + c("a_2") * h2 + c("a_s") * s
    return new + c("a_n") * torch.exp(0.5 * c("lv0")) * z, y, m, h1
