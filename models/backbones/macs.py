"""Multiply-accumulates of convolutions and linear layers, counted by running the network once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def count_macs(network: nn.Module, run: Callable[[], Any]) -> int:
    """Conv and linear MACs of `run()`, which must call `network` (or parts of it) on one row."""
    total = 0

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            total += output.numel() * kernel
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return total
