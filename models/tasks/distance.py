"""A folder of a feature distance beside an ensemble: how far an image's taps lie from those of every class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.backbones.distance import FeatureDistance
from models.backbones.resnet import ResNet
from models.store import StoreError, read_config
from models.tasks.beside import check_source, filled

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
        network = filled(network, folder, config, FILE, "the source, or `fields` of config.json")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}/config.json: missing or malformed: {error!r}; fit the distance again") from error
    return Distance(network, config["files"][FILE])
