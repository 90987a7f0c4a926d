"""Where a training runs, and how long it may."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.api import UserError
from models.tasks.device import pick_device


@dataclass(frozen=True)
class Session:
    """A device, and the `time.monotonic()` at which what is not finished stops, with a checkpoint."""

    device: torch.device = torch.device("cpu")
    until: float = math.inf

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.until


HERE = Session()


class Paused(Exception):
    """The session was over before run `label` was: `step` of `steps` are in its checkpoint, to go on from."""

    def __init__(self, label: str, step: int, steps: int) -> None:
        super().__init__(f"{label} stopped at step {step} of {steps}")
        self.label, self.step, self.steps = label, step, steps


def begin(device: str, minutes: float | None = None) -> Session:
    """A session on device `auto`, `cpu` or `cuda`, of so many minutes from now.

    On CUDA float32 matmuls may run as TF32, and convolutions pick their fastest kernel.

    Raises:
        UserError: no such device here.
    """
    try:
        where = pick_device(device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--device {device}: there is no such device here; use cpu or auto") from error
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return Session(where, math.inf if minutes is None else time.monotonic() + 60.0 * minutes)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights lie."""
    return next(network.parameters()).device


def half(device: torch.device, enabled: bool) -> torch.autocast:
    """bfloat16 autocast on the device."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def to(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the device, without waiting for it."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
