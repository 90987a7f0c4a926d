"""Method exits in the table of classifiers: every seed of the heads, what they cost on test images, and their time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.resnet import ResNet
from models.evaluation.costs import BATCHES, Cost, Counter, parameters
from models.evaluation.score import Answers
from models.evaluation.turns import measure_times
from models.store import read_config
from models.tasks.beside import folder_beside
from models.tasks.exits import EarlyExits, load_exits
from models.training.data import Split
from models.training.members import pixels_of
from models.training.session import device_of
from models.uncertainty.early_exit import Floats, Ints
from models.uncertainty.scores import log_softmax


def load_seeds(ensemble: Path, source: ResNet) -> list[EarlyExits]:
    """Heads of every seed on the ensemble's source; none where no exits folder stands beside it."""
    if (folder := folder_beside(ensemble, "exits")) is None:
        return []
    config = read_config(ensemble, "ensemble")
    return [load_exits(folder, config, source, name) for name in read_config(folder, "exits")["networks"]]


@torch.inference_mode()
def leave(exits: EarlyExits, split: Split, batch: int = 1000) -> tuple[Floats, Ints]:
    """Log probabilities (N, K) of a split, as served, and the no. of the exit (N,) that gave each."""
    found, device = [], device_of(exits.networks[0])
    for i in range(0, len(split), batch):
        every = exits.every(pixels_of(split.images[i : i + batch], device))
        found.append(exits.leave([log_softmax(z.double().cpu().numpy()) for z in every]))
    p, left = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.log(np.maximum(p, 1e-12)), left


def answers_of(exits: EarlyExits, parts: dict[str, Split]) -> Answers:
    """Of selection, test and, where there are any, foreign images."""
    return Answers(**{name: leave(exits, split)[0] for name, split in parts.items()})


def cost_of_exits(counter: Counter, exits: EarlyExits, left: Ints) -> Cost:
    """Of images that leave at exits `left` (N,): their mean, and the time of batches of which as many leave there."""
    stay = 1.0 - np.cumsum(np.bincount(left, minlength=len(exits.stages))) / len(left)
    source, held = counter.members[0], nn.ModuleList(exits.networks)
    return Cost(
        macs=float(np.take(exits.costs, left).mean()),
        parameters=parameters(held) / parameters(source),
        times={batch: time_leaving(counter, exits, stay[:-1].tolist(), batch) for batch in BATCHES},
    )


@torch.inference_mode()
def time_leaving(counter: Counter, exits: EarlyExits, stay: Sequence[float], batch: int) -> float:
    """Time of `batch` images relative to the source, where shares `stay` of them go on after each exit but the last.

    Of a single image, which goes on or not, the mean over where it leaves.
    """
    x, source = counter.pixels(batch), counter.members[0]

    def run(x: Tensor, rows: Sequence[int]) -> None:
        for network, n in zip(exits.networks, [len(x), *rows], strict=True):
            if not n:
                break
            x, logits, *_ = network(x[:n])
            logits.softmax(-1).amax(-1)

    def ways() -> list[tuple[float, list[int]]]:
        if batch > 1:
            return [(1.0, [round(share * batch) for share in stay])]
        here = [1.0, *stay, 0.0]
        return [(here[k] - here[k + 1], [int(j < k) for j in range(len(stay))]) for k in range(len(stay) + 1)]

    runs = {str(i): (lambda rows=rows: run(x, rows)) for i, (_, rows) in enumerate(ways())}
    seconds = measure_times({"source": lambda: source(x), **runs})
    return sum(weight * seconds[str(i)] for i, (weight, _) in enumerate(ways())) / seconds["source"]
