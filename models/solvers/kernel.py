"""One fused, branch-free update for every row, whatever its solver (table.py has the formula)."""

from __future__ import annotations

import torch
from torch import Tensor


def update(
    coef: Tensor, x: Tensor, s: Tensor, h1: Tensor, h2: Tensor, o: Tensor, z: Tensor, v: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance rows by one evaluation. Elementwise only, so that a row's bits do not depend on its batch.

    Args:
        coef: coefficient rows (N, fields), in the order of table.FIELDS.
        x, s, h1, h2: state and history (N, C, H, W).
        o: network output, guided already; z: standard normal noise; both (N, C, H, W).
        v: learned variance in [-1, 1] (N, C, H, W); rows without it (lv0 = lv1 = 0) pay no heed, to the bit.

    Returns:
        The new (x, s, h1, h2).
    """
    columns = coef[:, :, None, None, None].unbind(1)
    _, _, c_x, c_o, clip, k_x, k_m, k_1, k_2, k_s, a_y, a_o, a_m, a_1, a_2, a_s, a_n, lv0, lv1 = columns
    m = (c_x * x).addcmul_(c_o, o).clamp_(-clip, clip)
    y = (k_x * x).addcmul_(k_m, m).addcmul_(k_1, h1).addcmul_(k_2, h2).addcmul_(k_s, s)
    new = (a_y * y).addcmul_(a_o, o).addcmul_(a_m, m).addcmul_(a_1, h1).addcmul_(a_2, h2).addcmul_(a_s, s)
    log_variance = lv0 if v is None else torch.addcmul(lv0, 0.5 * v + 0.5, lv1 - lv0)
    return new.addcmul_(a_n * torch.exp(0.5 * log_variance), z), y, m, h1
