"""Train the members of a deep ensemble: same recipe, different seeds, until they fit their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import ResNet, ResNetConfig
from models.store import write_model
from models.tasks.classifier import to_pixels
from models.training.data import Images, Split, Splits
from models.training.loop import Optim, train
from models.uncertainty.scores import fit_temperature, log_softmax, mean_log_probability

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class MembersRecipe:
    """`offramp train members`. `images`: how many training images the members see.

    `pool` more are trained after them, for evaluation alone: deep ensembles are averaged over subsets of all.
    `purifier`: which generator purifies images, and how far, where it stands beside the ensemble.
    """

    name: str
    labels: list[str]
    optim: Optim
    members: int = 5
    pool: int = 0
    purifier: dict[str, Any] = field(default_factory=dict)
    images: int = 12_000
    network: ResNetConfig = field(default_factory=ResNetConfig)
    shift: int = 0
    flip: bool = False
    bf16: bool = True
    seed: int = 0


def random_shift(x: Tensor, most: int) -> Tensor:
    """Shift every image (N, C, H, W) by up to `most` pixels each way, zeros coming in."""
    if not most:
        return x
    n, _, h, w = x.shape
    padded = F.pad(x, [most] * 4)
    dy, dx = torch.randint(0, 2 * most + 1, (2, n))
    rows = (dy[:, None] + torch.arange(h))[:, None, :, None]
    cols = (dx[:, None] + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(x.shape[1])[None, :, None, None], rows, cols]


def augment(x: Tensor, shift: int, flip: bool) -> Tensor:
    """Images (N, C, H, W) shifted by up to `shift` pixels and, with `flip`, half of them mirrored left to right.

    A shift of 4 is the random crop after padding by 4 of He et al. (CVPR 2016).
    """
    x = random_shift(x, shift)
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x) if flip else x


def epoch_rows(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Rows of minibatch `step` when every epoch is a fresh permutation of n rows; stateless."""
    per_epoch = n // batch
    epoch, at = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return torch.from_numpy(order[at * batch : (at + 1) * batch])


def channels_last(model: Network) -> Network:
    """The same network with its convolutions laid out for the CPU's faster kernels."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def predict(model: ResNet, images: Images, batch: int = 1000) -> Tensor:
    """Logits (N, K) of uint8 images (N, H, W, C), inference mode."""
    model.eval()
    return torch.cat([model(to_pixels(images[i : i + batch])) for i in range(0, len(images), batch)])


def train_members(recipe: MembersRecipe, splits: Splits, out: Path) -> dict[str, Any]:
    """Train and write the ensemble to `out`/<name>; returns the summary."""
    split = splits.train[slice(0, recipe.images)]
    x, y = to_pixels(split.images), torch.from_numpy(split.labels)
    files, rows, seconds = {}, [], 0.0
    for index in range(recipe.members + recipe.pool):
        seed = recipe.seed + index + 1
        torch.manual_seed(seed)
        model = channels_last(ResNet(recipe.network))

        def loss(step: int, model: ResNet = model, seed: int = seed) -> Tensor:
            rows = epoch_rows(len(y), recipe.optim.batch, step, seed)
            batch = augment(x[rows], recipe.shift, recipe.flip).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                logits = model(batch)
            return F.cross_entropy(logits.float(), y[rows])

        label = f"member-{index + 1}"
        done = train(model, recipe.optim, loss, out / "runs" / recipe.name / label, label=label)
        member = done.ema
        assert isinstance(member, ResNet)
        seconds += done.seconds
        fitted = (predict(member, split.images).argmax(1) == y).float().mean().item()
        chosen = splits.selection
        held = (predict(member, chosen.images).argmax(1).numpy() == chosen.labels).mean()
        rows.append({"member": index + 1, "seed": seed, "train_accuracy": fitted, "selection_accuracy": float(held)})
        files[f"{label}.safetensors"] = member.state_dict()
    config = {
        "kind": "ensemble",
        "name": recipe.name,
        "backbone": "resnet",
        "network": dataclasses.asdict(recipe.network),
        "labels": recipe.labels,
        "image": [*split.images.shape[1:]],
        "members": list(files)[: recipe.members],
        "pool": list(files)[recipe.members :],
        "trained_on": {"images": len(y)},
    }
    if recipe.purifier:
        config["purifier"] = recipe.purifier
    digest = write_model(out / recipe.name, config, files)
    return {"model": recipe.name, "weights": digest, "seconds": seconds, "members": rows}


def temperatures(members: Sequence[ResNet], selection: Split) -> dict[str, float]:
    """Those of `single` and `ensemble`, fitted on the averaged probabilities of the selection images."""
    log_p = log_softmax(torch.stack([predict(m, selection.images) for m in members], 1).double().numpy())
    return {
        "single": fit_temperature(log_p[:, 0], selection.labels),
        "ensemble": fit_temperature(mean_log_probability(log_p), selection.labels),
    }
