"""A folder of a feature distance beside an ensemble: how far an image's taps lie from those of every class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.backbones.distance import FeatureDistance
from models.backbones.resnet import ResNet
from models.store import StoreError, read_config, read_tensors
from models.tasks.beside import check_source, finite

FILE = "distance.safetensors"


@dataclass(frozen=True, eq=False)
class Distance:
    """The layer on the source's tap, and the digest of its file."""

    network: FeatureDistance
    sha256: str


def load_distance(folder: Path, ensemble: dict[str, Any], source: ResNet) -> Distance:
    """What a distance folder serves.

    Raises:
        StoreError: fitted on another source, preprocessing or tap; malformed, of another shape, or not finite.
    """
    config = read_config(folder, "distance")
    try:
        check_source(folder, config["source"], ensemble, "distance")
        network = FeatureDistance(source.config.width, config["fields"], source.fc.out_features)
        tensors, sha256 = finite(folder / FILE, read_tensors(folder, FILE, config["files"])), config["files"][FILE]
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}/config.json: missing or malformed: {error!r}; fit the distance again") from error
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in network.state_dict().items()}:
        raise StoreError(f"{folder / FILE} does not fit the source, or `fields` of config.json: fit the distance again")
    network.load_state_dict(tensors)
    return Distance(network.eval().requires_grad_(False), sha256)
