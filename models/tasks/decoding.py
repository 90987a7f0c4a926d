"""Latents to pixels as a scheduled stage: a few rows a tick, so that a slow decoder does not stall the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.codecs.interface import Codec
from models.tasks.device import Copy, Wait, at_once

SHARE = 8


def levels(pixels: Tensor) -> Tensor:
    """Pixels (N, C, H, W) in [-1, 1] -> levels (N, H, W, C), uint8, where they are."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Levels (N, H, W, C) of pixels (N, C, H, W), on the host."""
    out: NDArray[np.uint8] = levels(pixels).cpu().numpy()
    return out


class DecodeStage:
    """Rows whose last evaluation is done wait here, longest first, for one decode each.

    `alone`: rows to decode at once when none is being drawn; more than one pays on a GPU only. `copy` brings pixels to
    the host.
    """

    def __init__(
        self, codec: Codec, capacity: int, row_shape: tuple[int, int, int], alone: int = 1, copy: Copy = at_once
    ) -> None:
        channels, height, width = codec.image_shape(row_shape)
        self.codec, self.alone, self._copy = codec, alone, copy
        self.pixels = np.zeros((capacity, height, width, channels), np.uint8)
        self._queue: dict[int, None] = {}

    def enter(self, slots: Sequence[int]) -> None:
        """Rows that are ready to be decoded."""
        self._queue.update(dict.fromkeys(slots))

    def forget(self, slots: Sequence[int]) -> None:
        """Slots that were given to new rows."""
        for slot in slots:
            self._queue.pop(slot, None)

    def choose(self, slots: Sequence[int], drawing: int) -> list[int]:
        """Which of `slots` to decode now, beside `drawing` rows that are still being drawn.

        One for every eight of them, rounded up: rows of eight steps or more are decoded as fast as they come.
        """
        budget = -(-drawing // SHARE) or self.alone
        listed = set(slots)
        return [slot for slot in self._queue if slot in listed][:budget]

    def decode(self, states: Tensor) -> tuple[Tensor, Wait]:
        """Start bringing the pixels (n, H, W, channels) of states (n, C, h, w) to the host; nothing is kept yet."""
        return self._copy(levels(self.codec.decode(states)).contiguous())

    def keep(self, slots: Sequence[int], pixels: Tensor, wait: Wait) -> None:
        """Pixels of rows that wait no more, once they are here."""
        wait()
        self.pixels[list(slots)] = pixels.numpy()
        self.forget(slots)
