"""`offramp eval distances`: how far an image's features lie from those of each class, as a score of foreign images.

Gaussians per class as in `uncertainty.gaussians`, on every layer, with one covariance for all classes or one each.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from models.backbones.distance import pool
from models.backbones.resnet import ResNet
from models.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from models.evaluation.metrics import auroc
from models.evaluation.report import find, markdown, origin, provenance
from models.store import read_config
from models.tasks.classifier import load_members, to_pixels
from models.training.data import Images, Split, read, splits
from models.uncertainty.gaussians import Gaussians

Floats = NDArray[np.float64]
FLAGGED = 0.05  # share of selection images above the threshold
FIELDS = (1, 2, 3, 4)  # means of k x k fields of the tap
SOME = 1000  # selection images that corruptions are shown on


@torch.inference_mode()
def layers(source: ResNet, images: Images) -> dict[str, Floats]:
    """Pooled features (N, D) of uint8 images (N, H, W, C) by layer, the tap's also by fields."""
    found: dict[str, list[Floats]] = {}
    for i in range(0, len(images), 1000):
        h = source.tap(to_pixels(images[i : i + 1000]))
        for k in FIELDS:
            found.setdefault(f"tap, {k} x {k} fields", []).append(pool(h, k).double().numpy())
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
