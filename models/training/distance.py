"""`offramp train distance`: Gaussians over the source's tap, fitted in one pass; nothing descends.

Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks" (NeurIPS
2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.backbones.distance import FeatureDistance, pool
from models.backbones.resnet import ResNet
from models.store import write_model
from models.tasks.beside import TAP
from models.tasks.classifier import to_pixels
from models.tasks.distance import FILE
from models.training.data import Split
from models.training.recipe import RecipeError
from models.uncertainty.gaussians import Gaussians

COVARIANCES = ("by class", "shared")


@dataclass(frozen=True)
class DistanceRecipe:
    """Gaussians over means of fields x fields fields of the tap of `ensemble`'s source; which covariance they have."""

    name: str
    ensemble: str
    fields: int = 2
    covariance: str = "by class"

    def __post_init__(self) -> None:
        if self.covariance not in COVARIANCES:
            raise RecipeError(f"covariance must be one of {', '.join(COVARIANCES)}, got {self.covariance!r}")
        if self.fields < 1:
            raise RecipeError(f"fields must be at least 1, got {self.fields}")


@torch.inference_mode()
def fit_distance(recipe: DistanceRecipe, source: ResNet, images: Split) -> FeatureDistance:
    """Fit on images that the source did not see.

    Raises:
        RecipeError: a covariance has no more images than a feature has numbers, or a class none.
    """
    taps = (source.tap(to_pixels(images.images[i : i + 1000])) for i in range(0, len(images), 1000))
    features = torch.cat([pool(tap, recipe.fields) for tap in taps]).double().numpy()
    least = int(np.bincount(images.labels, minlength=source.fc.out_features).min())
    shared, size = recipe.covariance == "shared", features.shape[1]
    if not least or (len(images) if shared else least) <= size:
        raise RecipeError(
            f"{len(images)} images that the source did not see, {least} of the rarest class, are too few for features "
            f"of {size} numbers: use fewer fields, or hold more images out of the members' training"
        )
    return FeatureDistance.from_gaussians(Gaussians.fit(features, images.labels, shared), recipe.fields)


def write_distance(
    folder: Path, recipe: DistanceRecipe, ensemble: Mapping[str, Any], network: FeatureDistance, images: int
) -> str:
    """Write a distance folder in float32, tied to the exact weights of its source; returns its digest."""
    source = ensemble["members"][0]
    config = {
        "kind": "distance",
        "name": recipe.name,
        "backbone": "distance",
        "ensemble": recipe.ensemble,
        "source": {
            "file": source,
            "sha256": ensemble["files"][source],
            "network": ensemble["network"],
            "tap": TAP,
        },
        "fields": recipe.fields,
        "covariance": recipe.covariance,
        "fitted_on": {"images": images, "seen_by_the_source": False},
    }
    return write_model(folder, config, {FILE: network.state_dict()}, keep_dtype=True)
