"""The bridge of Diffusion Bridge Networks, constant beta, in its well-scaled form.

Kim et al. (ICLR 2024), after Liu et al., "I2SB" (ICML 2023): with tau = n / T,

    Z_tau | Z_0, Z_1 ~ N((1 - tau) Z_0 + tau Z_1, beta tau (1 - tau) I)

Z_0 is the centred log of the members' mean probability, Z_1 the source's centred logits softened by
S. The network gives u ~ (Z_tau - Z_0) / tau. Sampling adds no noise (at beta = 1e-4 it is below 0.01 logit),
so an answer is a function of its image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 1e-4
TEMPERATURE_BASE = 2.0
TEMPERATURE_SPREAD = 0.4
TEMPERATURE = TEMPERATURE_BASE + TEMPERATURE_SPREAD / 6.0  # mean of 2 + 0.4 Beta(1, 5)


def centre(z: Tensor) -> Tensor:
    """Logits (..., K) less their mean over classes."""
    return z - z.mean(-1, keepdim=True)


def target(member_logits: Tensor) -> Tensor:
    """Z_0 (N, K) from member logits (N, M, K): centred log of the mean probability."""
    mean = torch.log_softmax(member_logits, -1).logsumexp(1) - math.log(member_logits.shape[1])
    return centre(mean)


def source(logits: Tensor, temperature: Tensor | float = TEMPERATURE) -> Tensor:
    """Z_1 (N, K) from the source's logits; `temperature` a number or (N, 1)."""
    return centre(logits) / temperature


def sample_temperature(n: int, device: torch.device | None = None) -> Tensor:
    """S per row (n, 1): 2 + 0.4 Beta(1, 5), by inverting the distribution function."""
    return TEMPERATURE_BASE + TEMPERATURE_SPREAD * (1.0 - torch.rand(n, 1, device=device) ** (1.0 / 5.0))


def sample_between(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
    """Z_tau (N, K) between end points, tau (N, 1) in (0, 1]."""
    spread = torch.sqrt(BETA * tau * (1.0 - tau))
    return (1.0 - tau) * z0 + tau * z1 + spread * torch.randn_like(z0)


def posterior_mean(z: Tensor, u: Tensor, step: Tensor, steps: int) -> Tensor:
    """One step n -> n - 1 of T = `steps`: Z_{n-1} = Z_0_hat / n + (1 - 1/n) Z_n, with step (N, 1) = n."""
    estimate = z - (step / steps) * u
    return estimate / step + (1.0 - 1.0 / step) * z
