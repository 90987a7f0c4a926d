"""Pixel models: the state is the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.api import UserError
from models.codecs.interface import Codec, Shape


class Identity(Codec):
    """Clips to the pixel range."""

    free = True

    def image_shape(self, row_shape: Shape) -> Shape:
        """See Codec."""
        if row_shape[0] not in (1, 3):
            raise UserError(f"rows of {row_shape[0]} channels are no pictures: name a codec in config.json")
        return row_shape

    def decode(self, states: Tensor) -> Tensor:
        """See Codec."""
        return states.clamp(-1.0, 1.0)


def load(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Identity:
    """Takes neither settings nor weights."""
    if config or tensors:
        raise UserError(f"codec identity takes no settings and no weights, got {sorted([*config, *tensors])}")
    return Identity()
