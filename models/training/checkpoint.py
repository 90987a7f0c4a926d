"""Training state on disk as safetensors and JSON, so that a run resumes where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.training.session import device_of

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, running mean of the loss, seconds spent over all sessions.

    `restarted`: the step from which the optimizer's moments began anew.
    """

    step: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    restarted: int = 0


def save_checkpoint(
    folder: Path, progress: Progress, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Write model, averaged copy, optimizer and random state; a crash leaves the previous one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    if (device := device_of(model)).type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    tensors |= {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    write(folder, {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, progress)


def write(folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Put a checkpoint in the place of the one before."""
    fresh = folder / f"{CHECKPOINT}.new"
    save_file(tensors, fresh, {"progress": json.dumps(asdict(progress))})
    fresh.replace(folder / CHECKPOINT)


def read_progress(path: Path) -> Progress:
    """Where the run of a checkpoint stands."""
    with safe_open(path, "pt") as file:
        return Progress(**json.loads(file.metadata()["progress"]))


def load_checkpoint(folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore what `save_checkpoint` or `compact` wrote, if anything; returns where the run stands."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return Progress()
    progress, tensors = read_progress(path), load_file(path)
    torch.set_rng_state(tensors.pop("rng"))
    if (own := tensors.pop("rng.cuda", None)) is not None and (device := device_of(model)).type == "cuda":
        torch.cuda.set_rng_state(own, device)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model.") or part("ema."))
    ema.load_state_dict(part("ema."))
    state: dict[int, dict[str, Any]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    if state:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        lay_out(optimizer)
    return progress


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the strides of their parameters, which fused kernels pair in memory order: files know none."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def compact(folder: Path, out: Path) -> None:
    """Copy a checkpoint to where room is dear: of its weights the average alone, in float16.

    A finished run is all there, rounded as its model is when it is written. One that resumes from it goes on from its
    average, and warms up again while the moments of the optimizer build up.
    """
    progress, tensors = read_progress(folder / CHECKPOINT), load_file(folder / CHECKPOINT)
    kept = {k: v for k, v in tensors.items() if k.startswith(("rng", "ema."))}
    small = {k: v.half() if v.is_floating_point() else v for k, v in kept.items()}
    out.mkdir(parents=True, exist_ok=True)
    write(out, small, replace(progress, restarted=progress.step))


def append_log(folder: Path, **values: object) -> None:
    """One JSON line of training history."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
