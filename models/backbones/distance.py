"""How far the source's tap lies from the taps of each class: Gaussians over its means of fields, as one small layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.uncertainty.gaussians import Gaussians


def pool(tap: Tensor, fields: int) -> Tensor:
    """(N, C, H, W) -> (N, C fields^2): means of fields x fields fields; by plain pooling, which is faster, if even."""
    height, width = tap.shape[-2:]
    if height % fields or width % fields:
        return F.adaptive_avg_pool2d(tap, fields).flatten(1)
    return F.avg_pool2d(tap, (height // fields, width // fields)).flatten(1)


class FeatureDistance(nn.Module):
    """Least negative log density over classes, in nats but for a constant (`uncertainty.gaussians`).

    One linear layer whitens for every class: (x - m) F = x F - m F.
    """

    half_log_det: Tensor

    def __init__(self, channels: int, fields: int, classes: int) -> None:
        super().__init__()
        self.fields, size = fields, channels * fields**2
        self.whiten = nn.Linear(size, classes * size)
        self.register_buffer("half_log_det", torch.zeros(classes))

    @classmethod
    def from_gaussians(cls, gaussians: Gaussians, fields: int) -> Self:
        """In float32, of Gaussians over pooled taps."""
        classes, size = gaussians.means.shape
        made = cls(size // fields**2, fields, classes)
        factors = gaussians.factors.transpose(0, 2, 1).reshape(-1, size)
        shift = -(gaussians.means[:, None] @ gaussians.factors).reshape(-1)
        state = {"whiten.weight": factors, "whiten.bias": shift, "half_log_det": 0.5 * gaussians.log_det}
        made.load_state_dict({name: torch.from_numpy(values).float() for name, values in state.items()})
        return made.eval().requires_grad_(False)

    def forward(self, tap: Tensor) -> Tensor:
        """Tap (N, C, H, W) -> distance (N,)."""
        white = self.whiten(pool(tap, self.fields)).unflatten(1, (len(self.half_log_det), -1))
        return (0.5 * white.square().sum(-1) + self.half_log_det).amin(1)
