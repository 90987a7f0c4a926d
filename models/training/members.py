"""Train the members of a deep ensemble: same recipe, different seeds, until they fit their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import ResNet, ResNetConfig
from models.store import write_model
from models.training.data import Images, Split, Splits
from models.training.loop import Optim, train
from models.training.session import HERE, Session, device_of, half
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


def pixels_of(images: Images, device: torch.device) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], on the device."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255.0


def random_shift(x: Tensor, most: int) -> Tensor:
    """Shift every image (N, C, H, W) by up to `most` pixels each way, zeros coming in."""
    if not most:
        return x
    (n, _, h, w), device = x.shape, x.device
    padded = F.pad(x, [most] * 4)
    dy, dx = torch.randint(0, 2 * most + 1, (2, n), device=device)
    rows = (dy[:, None] + torch.arange(h, device=device))[:, None, :, None]
    cols = (dx[:, None] + torch.arange(w, device=device))[:, None, None, :]
    image, channel = torch.arange(n, device=device), torch.arange(x.shape[1], device=device)
    return padded[image[:, None, None, None], channel[None, :, None, None], rows, cols]


def augment(x: Tensor, shift: int, flip: bool) -> Tensor:
    """Images (N, C, H, W) shifted by up to `shift` pixels and, with `flip`, half of them mirrored left to right.

    A shift of 4 is the random crop after padding by 4 of He et al. (CVPR 2016).
    """
    x = random_shift(x, shift)
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x) if flip else x


def epoch_rows(n: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """Rows of minibatch `step` when every epoch is a fresh permutation of n rows; stateless."""
    epoch, at = divmod(step, n // batch)
    return epoch_order(n, seed, epoch)[at * batch : (at + 1) * batch]


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of n rows that is an epoch; not to be written to."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def channels_last(model: Network) -> Network:
    """The same network with its convolutions laid out for the faster kernels."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def predict(model: ResNet, images: Images, batch: int = 1000) -> Tensor:
    """Logits (N, K), on the CPU, of uint8 images (N, H, W, C), inference mode."""
    device = device_of(model.eval())
    starts = range(0, len(images), batch)
    return torch.cat([model(pixels_of(images[i : i + batch], device)) for i in starts]).cpu()


def train_members(recipe: MembersRecipe, splits: Splits, out: Path, session: Session = HERE) -> dict[str, Any]:
    """Train and write the ensemble to `out`/<name>; returns the summary."""
    split = splits.train[slice(0, recipe.images)]
    x, y = pixels_of(split.images, session.device), torch.from_numpy(split.labels).to(session.device)
    files, rows, seconds = {}, [], 0.0
    for index in range(recipe.members + recipe.pool):
        seed = recipe.seed + index + 1
        torch.manual_seed(seed)
        model = channels_last(ResNet(recipe.network).to(session.device))

        def loss(step: int, model: ResNet = model, seed: int = seed) -> Tensor:
            rows = epoch_rows(len(y), recipe.optim.batch, step, seed).to(y.device, non_blocking=True)
            batch = augment(x[rows], recipe.shift, recipe.flip).contiguous(memory_format=torch.channels_last)
            with half(y.device, recipe.bf16):
                logits = model(batch)
            return F.cross_entropy(logits.float(), y[rows])

        label = f"member-{index + 1}"
        done = train(model, recipe.optim, loss, out / "runs" / recipe.name / label, label=label, session=session)
        member = done.ema
        assert isinstance(member, ResNet)
        seconds += done.seconds
        fitted = (predict(member, split.images).argmax(1) == y.cpu()).float().mean().item()
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
