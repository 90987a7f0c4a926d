"""Training state on disk as safetensors and JSON, so that a run resumes where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, running mean of the loss, seconds spent over all sessions."""

    step: int = 0
    loss: float = float("nan")
    seconds: float = 0.0


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write model, averaged copy, optimizer and random state; a crash leaves the previous one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    tensors |= {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    fresh = folder / "checkpoint.safetensors.new"
    save_file(tensors, fresh, {"progress": json.dumps(asdict(progress))})
    fresh.replace(folder / "checkpoint.safetensors")


def load_checkpoint(folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore what `save_checkpoint` wrote, if anything; returns where the run stands."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return Progress()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    tensors = load_file(path)
    torch.set_rng_state(tensors.pop("rng"))

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    ema.load_state_dict(part("ema."))
    state: dict[int, dict[str, Any]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress


def append_log(folder: Path, **values: object) -> None:
    """One JSON line of training history."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
