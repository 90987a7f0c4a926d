"""A diffusion network in bfloat16, its state in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.api import UserError
from models.backbones.interface import Backbone, Segment

PRECISIONS = ("fp32", "bf16")


def choose(wanted: str, promised: str, device: torch.device) -> str:
    """The precision to run in: `wanted`, or for `auto` on CUDA what the model's numbers were measured to hold in.

    Args:
        promised: `precision` in the model's config.json, fp32 where it says nothing.

    Raises:
        UserError: either is no precision.
    """
    if promised not in PRECISIONS:
        raise UserError(f"config.json: precision must be fp32 or bf16, got {promised!r}")
    if wanted not in ("auto", *PRECISIONS):
        raise UserError(f"precision must be auto, fp32 or bf16, got {wanted!r}")
    if wanted != "auto":
        return wanted
    return promised if device.type == "cuda" else "fp32"


def at_precision(model: Backbone, precision: str) -> Backbone:
    """The network itself, or one like it in bfloat16 with weights of its own."""
    return Bfloat16(model).eval() if precision == "bf16" else model


class Bfloat16(Backbone):
    """Tokens in bfloat16. One-token work and the head, which cost little, stay float32, as do input and output; what
    the head is conditioned on is rounded as for the blocks.

    The residual stream is bfloat16 too, other than under torch.autocast: half the bytes in every operation.
    """

    def __init__(self, whole: Backbone) -> None:
        super().__init__()
        self.whole, self.low = whole, copy.deepcopy(whole).to(torch.bfloat16)
        self.depth, self.always, self.bypasses = whole.depth, whole.always, whole.bypasses
        self.ranks, self.null_label, self.row_shape = whole.ranks, whole.null_label, whole.row_shape
        self.learned_variance = whole.learned_variance
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, network: Mapping[str, Any]) -> Self:
        """A TypeError: what it is comes from the network that it wraps, see `at_precision`."""
        raise TypeError("a Bfloat16 has no config of its own: build the backbone, then at_precision(backbone, 'bf16')")

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """See Backbone; worked out in float32, (N, M) bfloat16."""
        return self.whole.condition(t, label).bfloat16()

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """See Pieces; x is float32, what comes out bfloat16."""
        return self.low.enter(x.bfloat16(), condition)

    def block(self, index: int, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """See Backbone."""
        return self.low.block(index, hidden, kept, condition)

    def bypass(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """See Pieces."""
        return self.low.bypass(segment, hidden, kept)

    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """See Pieces; (N, C or 2 C, H, W) float32."""
        return self.whole.leave(hidden.float(), condition.float())

    def frozen_in_exits(self) -> list[nn.Module]:
        """See Backbone."""
        return self.whole.frozen_in_exits()
