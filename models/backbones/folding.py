"""BatchNorm folded into the convolution before it, exact in eval mode."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

N = TypeVar("N", bound=nn.Module)


@torch.no_grad()
def fold(network: N) -> N:
    """Fold, in place, every BatchNorm2d that is registered right after a Conv2d of as many channels; returns `network`.

    With s = gamma / sqrt(variance + eps), per channel: weight s W and bias s (b - mean) + beta (Ioffe & Szegedy,
    ICML 2015, section 3.1), in float64. For networks in eval mode whose forward applies the two in that order.
    """
    for module in network.modules():
        for (_, conv), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold(conv, norm)
                setattr(module, name, nn.Identity())
    return network


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if conv.out_channels != norm.num_features:
        raise ValueError(f"a BatchNorm of {norm.num_features} channels after a convolution to {conv.out_channels}")
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    bias = scale * (bias - norm.running_mean.double()) + norm.bias.double()
    conv.weight = nn.Parameter((scale[:, None, None, None] * conv.weight.double()).float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
