"""Which images a method still gets right after an attack, with a purifier before it or none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.evaluation import attacks
from models.evaluation.attacks import Ball, Classify, attack, averaged, fresh
from models.purification.purify import Purifier, image_keys
from models.tasks.classifier import to_pixels
from models.training.data import Split

Right = NDArray[np.bool_]
NOISES = 8  # further noises that an attacked image must withstand


@dataclass(frozen=True)
class Images:
    """Pixels (N, C, H, W), whole levels of 255 scaled to [0, 1], with labels (N,)."""

    x: Tensor
    labels: Tensor

    def __getitem__(self, which: Right) -> Images:
        at = torch.from_numpy(np.flatnonzero(which))
        return Images(self.x[at], self.labels[at])


def pick(split: Split, n: int, seed: int) -> Images:
    """n images at random."""
    some = split[np.random.default_rng(seed).permutation(len(split))[:n]]
    return Images(to_pixels(some.images), torch.from_numpy(some.labels))


def keys_of(x: Tensor) -> Tensor:
    """The noise keys (N,) of pixels (N, C, H, W), from the bytes that the service would get."""
    images = (255.0 * x).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return image_keys(image.tobytes() for image in images)


@torch.no_grad()
def right(classify: Classify, purifier: Purifier | None, images: Images, keys: Tensor | None = None) -> Right:
    """Whether each image is classified as its label (N,), with the noise of its own bytes unless `keys` are given."""
    if not len(images.x):
        return np.zeros(0, np.bool_)
    told = keys_of(images.x) if keys is None else keys
    parts = [
        classify(x) if purifier is None else averaged(classify, purifier(x, key))
        for x, key in zip(images.x.split(64), told.split(64), strict=True)
    ]
    return np.asarray((torch.cat(parts).argmax(1) == images.labels).numpy())


def bare(classify: Classify, images: Images, ball: Ball, seed: int) -> dict[str, Right]:
    """A method without a purifier: right clean, and after PGD through the classifier; arrays (N,)."""
    clean = right(classify, None, images)
    found = attack(attacks.plain(classify), images.x, images.labels, ball, seed)
    robust = clean & right(classify, None, replace(images, x=found))
    return {"clean": clean, "classifier": robust, "worst": robust}


def purified(
    classify: Classify, purifier: Purifier, images: Images, ball: Ball, eot: int, seed: int
) -> dict[str, Right]:
    """A method behind a purifier, attacked with `eot` draws a gradient; arrays (N,).

    `worst` is right clean and after every attack. `noises`: and under NOISES other noises of the adaptive attacks'
    images. Images wrong already are not attacked; `unclipped` is tried on those that are right so far.
    """
    guess = replace(purifier, dose=replace(purifier.dose, draws=eot))
    ways = {
        "classifier": attacks.plain(classify),
        "bpda": attacks.bpda(classify, guess),
        "adaptive": attacks.adaptive(classify, guess),
        "unclipped": attacks.unclipped(classify, guess),
    }
    found = {"clean": right(classify, purifier, images)}
    attacked = {}
    for name, model in ways.items():
        hope = np.logical_and.reduce(list(found.values())) if name == "unclipped" else found["clean"]
        some = images[hope]
        attacked[name] = images.x.clone()
        attacked[name][torch.from_numpy(hope)] = attack(model, some.x, some.labels, ball, seed)
        found[name] = hope.copy()
        found[name][hope] = right(classify, purifier, replace(some, x=attacked[name][torch.from_numpy(hope)]))
    worst = np.logical_and.reduce(list(found.values()))
    steady, generator = worst.copy(), torch.Generator().manual_seed(seed)
    for name in ("adaptive", "unclipped"):
        for _ in range(NOISES):
            left = replace(images, x=attacked[name])[steady]
            steady[steady] = right(classify, purifier, left, fresh(len(left.x), generator))
    return {**found, "worst": worst, "noises": steady}
