"""What a codec offers. A codec module's `load(config, tensors)` builds it from the `codec` table of a config.json."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

Shape = tuple[int, int, int]


class Codec(nn.Module, ABC):
    """Final states of the sampler to pixels; holds weights, so it moves between devices like any module.

    `free`: decoding runs no network, so that rows on their way may be shown too.
    """

    free: bool = False

    @abstractmethod
    def image_shape(self, row_shape: Shape) -> Shape:
        """Shape of an image, (channels, H, W), for rows of shape (C, h, w).

        Raises:
            UserError: rows that this codec cannot decode.
        """

    @abstractmethod
    def decode(self, states: Tensor) -> Tensor:
        """States (N, C, h, w) float32 -> pixels (N, channels, H, W) in [-1, 1]."""
