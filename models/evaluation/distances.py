"""`offramp eval distances`: how far an image's features lie from those of each class, as a score of foreign images.

Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks" (NeurIPS
2018): a Gaussian per class over a layer's features; the score is the least negative log density over classes. Here
with one covariance for all classes, as there, and with one each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from models.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from models.evaluation.metrics import auroc
from models.evaluation.report import find, markdown, origin, provenance
from models.store import read_config
from models.tasks.classifier import load_members, to_pixels
from models.training.data import Images, Split, read, splits

Floats = NDArray[np.float64]
FLAGGED = 0.05  # share of selection images above the threshold
FIELDS = (1, 2, 3, 4)  # means of k x k fields of the tap
SOME = 1000  # selection images that corruptions are shown on
RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Gaussians:
    """One a class: means (C, D), whitening factors (C, D, D), log determinants (C,)."""

    means: Floats
    factors: Floats
    log_det: Floats

    @classmethod
    def fit(cls, features: Floats, labels: NDArray[np.int64], shared: bool) -> Gaussians:
        """From features (N, D); `shared`: one covariance, within classes, for all of them."""
        classes = np.unique(labels)
        means = np.stack([features[labels == k].mean(0) for k in classes])
        centred = features - means[np.searchsorted(classes, labels)]
        groups = [centred] * len(classes) if shared else [centred[labels == k] for k in classes]
        eye = RIDGE * np.eye(features.shape[1])
        factors = np.stack([np.linalg.cholesky(np.linalg.inv(g.T @ g / len(g) + eye)) for g in groups])
        return cls(means, factors, -2.0 * np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1))

    def distance(self, features: Floats) -> Floats:
        """Least negative log density over classes (N,), in nats, but for a constant."""
        each = zip(self.means, self.factors, self.log_det, strict=True)
        return np.min([0.5 * (np.square((features - m) @ f).sum(1) + d) for m, f, d in each], axis=0)


@torch.inference_mode()
def layers(source: ResNet, images: Images) -> dict[str, Floats]:
    """Pooled features (N, D) of uint8 images (N, H, W, C) by layer, the tap's also by fields."""
    found: dict[str, list[Floats]] = {}
    for i in range(0, len(images), 1000):
        h = source.tap(to_pixels(images[i : i + 1000]))
        for k in FIELDS:
            fields = F.adaptive_avg_pool2d(h, k).flatten(1)
            found.setdefault(f"tap, {k} x {k} fields", []).append(fields.double().numpy())
        for number, block in enumerate(source.rest, 2):
            h = block(h)
            found.setdefault(f"block {number}", []).append(h.mean(dim=(2, 3)).double().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def distances(
    folder: Path,
    data: Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")],
    ood: Annotated[Path, typer.Option(help="Folder of out-of-distribution images of the same shape.")],
) -> None:
    """Foreign images flagged by distance in the source's features, at 5 % of images like the training images."""
    where, model = provenance(), find(folder)
    source, parts, foreign = load_members(model)[0], splits(data), read(ood, "test")
    seen = read_config(model)["trained_on"]["images"]
    rows = measure(source, parts.train[slice(seen, None)], parts.selection, parts.test, foreign)
    header = ["features", "covariance", "numbers", "AUROC corrupted, selection", "test flagged", "foreign flagged"]
    body = [[n, c, str(d), f"{a:.3f}", f"{t:.1%}", f"{o:.1%}"] for n, c, d, a, t, o in rows]
    note = (
        f"Gaussians fitted on the training images that the source did not see; the threshold flags {FLAGGED:.0%} of "
        f"the selection images. Corrupted: {SOME} selection images, mean over kinds and severities. {origin(where)}"
    )
    print(markdown(header, body), note, sep="\n\n")
    print(json.dumps({"model": model.name, "rows": rows, **where}))


Row = tuple[str, str, int, float, float, float]


def measure(source: ResNet, fitted: Split, selection: Split, test: Split, foreign: Split) -> list[Row]:
    """By layer and covariance: numbers a feature has, AUROC on corrupted images, shares of test and foreign flagged."""
    known = layers(source, fitted.images)
    sets = {"selection": selection.images, "test": test.images, "foreign": foreign.images}
    some = replace(selection, images=selection.images[:SOME])
    sets |= {f"{k} {s}": corrupt(some.images, k, s) for k in CORRUPTIONS for s in SEVERITIES}
    seen = {name: layers(source, images) for name, images in sets.items()}
    rows: list[Row] = []
    for layer, features in known.items():
        for covariance in ("shared", "by class"):
            gaussians = Gaussians.fit(features, fitted.labels, covariance == "shared")
            far = {name: gaussians.distance(found[layer]) for name, found in seen.items()}
            threshold = np.quantile(far["selection"], 1.0 - FLAGGED)
            worst = [auroc(far[f"{k} {s}"], far["selection"]) for k in CORRUPTIONS for s in SEVERITIES]
            flagged = [float((far[name] > threshold).mean()) for name in ("test", "foreign")]
            rows.append((layer, covariance, features.shape[1], float(np.mean(worst)), flagged[0], flagged[1]))
    return rows
