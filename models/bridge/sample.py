"""Run a bridge network from the source's logits to the ensemble estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from models.backbones.bridge import BridgeNetwork
from models.bridge.process import posterior_mean, source


@torch.inference_mode()
def run_bridge(
    network: BridgeNetwork,
    tap: Tensor,
    logits: Tensor,
    evaluations: int,
    softening: float,
    features: Tensor | None = None,
) -> Tensor:
    """Z_0 (N, K) from tap (N, C, H, W), source logits (N, K) and, for a network that wants them, features (N, F).

    `evaluations` = T walks every step; 1 takes the estimate at the source end at once.
    """
    steps, z = network.config.steps, source(logits, softening)
    if evaluations not in (1, steps):
        raise ValueError(f"evaluations must be 1 or {steps}, got {evaluations}")
    for n in range(steps, 0, -1):
        at = torch.full((len(z), 1), n, device=z.device)
        u = network(tap, z, at[:, 0], features)
        if evaluations == 1:
            return z - u
        z = posterior_mean(z, u, at.float(), steps)
    return z
