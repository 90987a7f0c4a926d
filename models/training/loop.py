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
from models.training.compiling import compile_in_place
from models.training.session import HERE, Paused, Session

LOOK = 50  # steps between looks at the loss where a look waits for the device
WARM = 3  # steps in which a compiled network is compiled


@dataclass(frozen=True)
class Optim:
    """How to descend. `steps` updates of `batch` rows; lr warms up linearly, then falls as a cosine.

    `minutes` > 0: the cosine runs over so many minutes of all sessions together, unless `steps` are done before, and
    the run ends with it. `compile`: the network by torch.compile, on CUDA, where there is a compiler; the minutes count
    from where it has been compiled.
    """

    steps: int
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.0
    algorithm: str = "adamw"
    ema: float = 0.999
    clip: float = 1.0
    checkpoint_every: int = 500
    minutes: float = 0.0
    compile: bool = False

    def spent(self, seconds: float) -> float:
        """The share of the minutes that is gone; 0 where there is no such limit."""
        return seconds / (60.0 * self.minutes) if self.minutes else 0.0

    def left(self, seconds: float) -> float:
        """Seconds that are left of the minutes."""
        return 60.0 * self.minutes - seconds if self.minutes else math.inf


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the averaged model, its last losses, seconds spent over all sessions."""

    ema: nn.Module
    loss: float
    seconds: float
    steps: int


def learning_rate(optim: Optim, step: int, spent: float = 0.0, restarted: int = 0) -> float:
    """Linear warm-up, then cosine to zero at `steps`, or when the share `spent` of the minutes is 1.

    Minutes that end sooner than the warm-up bring it to zero all the same. From step `restarted` on, where moments
    began anew, it warms up again.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
    progress = max(spent, (step - optim.warmup) / max(1, optim.steps - optim.warmup))
    again = min(1.0, (step + 1 - restarted) / max(1, optim.warmup)) if restarted else 1.0
    return again * 0.5 * optim.lr * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(optim: Optim, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (betas .9, .99) or SGD with Nesterov momentum .9."""
    if optim.algorithm == "adamw":
        return torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(0.9, 0.99), weight_decay=optim.weight_decay, fused=True
        )
    if optim.algorithm == "sgd":
        return torch.optim.SGD(parameters, lr=optim.lr, momentum=0.9, nesterov=True, weight_decay=optim.weight_decay)
    raise ValueError(f"optim.algorithm must be adamw or sgd, got {optim.algorithm!r}")


class Averager:
    """Averages the weights and buffers of a model into `ema`, a copy of it."""

    def __init__(self, ema: nn.Module, model: nn.Module) -> None:
        pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
        self.means = [old for old, _ in pairs if old.is_floating_point()]
        self.values = [new for _, new in pairs if new.is_floating_point()]
        self.counts = [(old, new) for old, new in pairs if not old.is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float, step: int) -> None:
        """The decay warms up as min(decay, (1+s)/(10+s)); what is no float is copied."""
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, self.values, 1 - decay)
        for old, new in self.counts:
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
    session: Session = HERE,
) -> Trained:
    """Run `loss(step).backward()` for `optim.steps` steps, resuming from a checkpoint in `out`.

    `loss` draws its own batch, from torch's global generators, which are checkpointed with the rest. `ema`: a copy of
    `model` to average into, for a loss that looks at it.

    Raises:
        Paused: the session was over first; the checkpoint is written.
        FloatingPointError: the loss is not finite: on the CPU at that step, on CUDA at the next of every LOOK; the last
            checkpoint is from before.
    """
    for module in freeze:
        module.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(optim, parameters)
    average = copy.deepcopy(model) if ema is None else ema
    average.requires_grad_(False)
    resumed = load_checkpoint(out, model, average, optimizer)
    step, mean, averager = resumed.step, torch.tensor(resumed.loss, dtype=torch.float64), Averager(average, model)
    done = step >= optim.steps or optim.spent(resumed.seconds) >= 1
    compiled = optim.compile and not done and compile_in_place(model)
    model.train()
    began = time.perf_counter()

    def seconds() -> float:
        if compiled and step < resumed.step + WARM:
            return resumed.seconds
        return resumed.seconds + time.perf_counter() - began

    def keep() -> None:
        now = finite(mean, label, step) if step else mean.item()  # there is none before the first
        stand = Progress(step, now, seconds(), resumed.restarted)
        save_checkpoint(out, stand, model, average, optimizer)
        append_log(out, label=label, step=step, loss=stand.loss, seconds=stand.seconds)

    while not done:
        if session.over:
            keep()
            raise Paused(label, step, optim.steps)
        spent = optim.spent(seconds())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, spent, resumed.restarted)
        value = loss(step)
        mean = averaged(mean, value.detach().double(), first=step == 0)
        done = step + 1 == optim.steps or spent >= 1
        looks = value.device.type == "cpu" or (step + 1) % LOOK == 0 or done
        if looks:
            finite(mean, label, step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        averager.update(optim.ema, step)
        step += 1
        if compiled and step == resumed.step + WARM:
            torch.cuda.synchronize()
            began = time.perf_counter()
        if step % 50 == 0 or done:
            left = (time.perf_counter() - began) / (step - resumed.step) * (optim.steps - step)
            progress(label, step, optim.steps, mean.item(), min(left, optim.left(seconds())))
        if step % optim.checkpoint_every == 0 or done:
            keep()
    return Trained(average.eval(), mean.item(), seconds(), step)


def finite(mean: Tensor, label: str, step: int) -> float:
    """The loss; FloatingPointError where it is not finite."""
    if not math.isfinite(now := mean.item()):
        raise FloatingPointError(f"{label}: loss is {now} at step {step}; lower optim.lr")
    return now


def averaged(mean: Tensor, value: Tensor, first: bool) -> Tensor:
    """The running mean of the loss, where the loss is."""
    return value if first else 0.98 * mean.to(value.device) + 0.02 * value


def progress(label: str, step: int, steps: int, loss: float, left: float) -> None:
    """One line on stderr, rewritten in place on a terminal; `left` in seconds."""
    end = "\r" if sys.stderr.isatty() and step < steps else "\n"
    bar = "#" * (20 * step // steps)
    line = f"{label} [{bar:<20}] {step}/{steps} loss {loss:.4f} {left / 60:.1f} min left"
    print(line, end=end, file=sys.stderr, flush=True)
