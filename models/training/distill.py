"""Train one network of a member's size on the ensemble's answers, far from where the members agree.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); Nam et al., "Diversity Matters When Learning
From Ensembles" (NeurIPS 2021), who distil on images moved by output diversified sampling (see transfer.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbones.resnet import ResNet, ResNetConfig
from models.bridge.process import target
from models.store import write_model
from models.training.data import Split
from models.training.loop import Optim, train
from models.training.members import channels_last, predict
from models.training.session import HERE, Session, half
from models.training.transfer import Cache, Transfer
from models.uncertainty.scores import fit_temperature, log_softmax, nll, soften


@dataclass(frozen=True)
class DistillRecipe:
    """`offramp train distill`. `ensemble` names the model whose mean answer `seeds` students learn."""

    name: str
    ensemble: str
    optim: Optim
    network: ResNetConfig = field(default_factory=ResNetConfig)
    transfer: Transfer = field(default_factory=Transfer)
    bf16: bool = True
    seeds: int = 3
    seed: int = 0


def train_students(
    recipe: DistillRecipe,
    cache: Cache,
    ensemble: Mapping[str, Any],
    selection: Split,
    out: Path,
    session: Session = HERE,
) -> dict[str, Any]:
    """Train and write the students to `out`/<name>; validation says which is served. Returns the summary."""
    goal, files, scores, seconds = target(cache.logits).softmax(-1), {}, {}, 0.0
    device = goal.device
    for seed in range(recipe.seed + 1, recipe.seed + 1 + recipe.seeds):
        label = f"student-{seed}"
        torch.manual_seed(seed)
        model = channels_last(ResNet(recipe.network).to(device))

        def loss(step: int, model: ResNet = model) -> Tensor:
            rows = torch.randint(len(goal), (recipe.optim.batch,), device=device)
            x = cache.pixels[rows].float().contiguous(memory_format=torch.channels_last)
            with half(device, recipe.bf16):
                logits = model(x)
            return F.kl_div(logits.float().log_softmax(-1), goal[rows], reduction="batchmean")

        done = train(model, recipe.optim, loss, out / "runs" / recipe.name / label, label=label, session=session)
        assert isinstance(done.ema, ResNet)
        log_p = log_softmax(predict(done.ema, selection.images).double().numpy())
        temperature = fit_temperature(log_p, selection.labels)
        scores[label] = {"temperature": temperature, "nll": nll(soften(log_p, temperature), selection.labels)}
        files[f"{label}.safetensors"], seconds = done.ema.state_dict(), seconds + done.seconds
    best = min(scores, key=lambda label: scores[label]["nll"])
    config = {
        "kind": "student",
        "name": recipe.name,
        "backbone": "resnet",
        "network": dataclasses.asdict(recipe.network),
        "ensemble": recipe.ensemble,
        "labels": ensemble["labels"],
        "image": ensemble["image"],
        "serve": f"{best}.safetensors",
        "temperature": float(np.float64(scores[best]["temperature"])),
    }
    weights = write_model(out / recipe.name, config, files)
    return {"model": recipe.name, "weights": weights, "serve": best, "validation": scores, "seconds": seconds}
