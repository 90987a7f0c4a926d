"""Where networks are measured."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from models.tasks.device import pick_device
from models.training.session import begin

Device = Annotated[str, typer.Option(help="Where networks run: cpu, cuda, or auto (CUDA where there is one).")]


def place(name: str) -> torch.device:
    """Device `auto`, `cpu` or `cuda`, on which float32 is float32: no TF32.

    Raises:
        UserError: no such device here.
    """
    begin(name)
    return pick_device(name)
