"""torch.compile of what a training spends its time in, on CUDA, where there is a compiler."""

from __future__ import annotations

import sys

import torch
from torch import nn

from models.backbones.interface import Backbone
from models.backends.compiled import check_tools
from models.backends.interface import BackendUnavailable
from models.training.session import device_of

PROGRAMS = 64  # of one code object: networks of a kind, with and without gradients, at fixed and at any batch


def compile_in_place(network: nn.Module) -> bool:
    """Compile a network at its first call; False, with the reason on stderr, where it stays as it is.

    Of a diffusion backbone the blocks are compiled, which share one program, whatever rows they run on. What fails to
    compile later runs as it is too, and torch logs why.
    """
    if reason := obstacle(device_of(network)):
        print(f"not compiled: {reason}", file=sys.stderr, flush=True)
        return False
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
    for part in repeated(network):
        part.compile()
    return True


def obstacle(device: torch.device) -> str:
    """Why not to compile on a device; empty where nothing speaks against it."""
    if device.type != "cuda":
        return f"on {device.type} trainings stay bit-identical; only those on CUDA are compiled"
    try:
        check_tools(device)
    except BackendUnavailable as missing:
        return str(missing)
    return ""


def repeated(network: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusion backbone; any other network itself."""
    blocks = getattr(network, "blocks", None)
    return list(blocks) if isinstance(network, Backbone) and isinstance(blocks, nn.ModuleList) else [network]
