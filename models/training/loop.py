"""One training loop for everything: AdamW or SGD, cosine or one-cycle, EMA, clipping, resume."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.training.checkpoint import Progress, append_log, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Optim:
    """How to descend. `steps` updates of `batch` rows; lr warms up linearly, then falls as a cosine."""

    steps: int
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    algorithm: str = "adamw"
    ema: float = 0.999
    clip: float = 1.0
    checkpoint_every: int = 500


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the averaged model, its last losses, seconds spent over all sessions."""

    ema: nn.Module
    loss: float
    seconds: float
    steps: int


def learning_rate(optim: Optim, step: int) -> float:
    """Linear warm-up, then cosine to zero at `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return 0.5 * optim.lr * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (betas .9, .99) or SGD with Nesterov momentum .9."""
    if optim.algorithm == "adamw":
        return torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(0.9, 0.99), weight_decay=optim.weight_decay, fused=True
        )
    if optim.algorithm == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=0.9, nesterov=True, weight_decay=optim.weight_decay)
    raise ValueError(f"optim.algorithm must be adamw or sgd, got {optim.algorithm!r}")


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Average weights and buffers; the decay warms up as min(decay, (1+s)/(10+s))."""
    decay = min(decay, (1 + step) / (10 + step))
    for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def train(
    model: nn.Module,
    optim: Optim,
    loss: Callable[[int], Tensor],
    out: Path,
    *,
    label: str,
    freeze: Iterable[nn.Module] = (),
    ema: nn.Module | None = None,
) -> Trained:
    """Run `loss(step).backward()` for `optim.steps` steps, resuming from a checkpoint in `out`.

    `loss` draws its own batch, from torch's global generator, which is checkpointed with the rest. `ema`: a copy of
    `model` to average into, for a loss that looks at it.
    """
    for module in freeze:
        module.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(optim, parameters)
    ema = copy.deepcopy(model) if ema is None else ema
    ema.requires_grad_(False)
    resumed = load_checkpoint(out, model, ema, optimizer)
    start, mean = resumed.step, resumed.loss
    model.train()
    began = time.perf_counter()

    def seconds() -> float:
        return resumed.seconds + time.perf_counter() - began

    for step in range(start, optim.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step)
        value = loss(step)
        if not math.isfinite(now := value.item()):
            raise FloatingPointError(f"{label}: loss is {now} at step {step}; lower optim.lr")
        value.backward()
        nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, optim.ema, step)
        mean = now if math.isnan(mean) else 0.98 * mean + 0.02 * now
        if (step + 1) % 50 == 0 or step + 1 == optim.steps:
            progress(label, step + 1, optim.steps, mean, (time.perf_counter() - began) / (step + 1 - start))
        if (step + 1) % optim.checkpoint_every == 0 or step + 1 == optim.steps:
            save_checkpoint(out, Progress(step + 1, mean, seconds()), model, ema, optimizer)
            append_log(out, label=label, step=step + 1, loss=mean, seconds=seconds())
    return Trained(ema.eval(), mean, seconds(), optim.steps)


def progress(label: str, step: int, steps: int, loss: float, per_step: float) -> None:
    """One line on stderr, rewritten in place on a terminal."""
    left = per_step * (steps - step)
    end = "\r" if sys.stderr.isatty() and step < steps else "\n"
    bar = "#" * (20 * step // steps)
    line = f"{label} [{bar:<20}] {step}/{steps} loss {loss:.4f} {left / 60:.1f} min left"
    print(line, end=end, file=sys.stderr, flush=True)
