"""A backbone as a list of pure functions of tensors, which a backend turns into programs of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.backbones.interface import Segment
from models.backends.interface import BackendUnavailable, Setup

Program = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Part:
    """One piece as a function of tensors, each with the rows in its first dimension.

    Attributes:
        name: unique in its network, fit for a file name.
        run: the function; `inputs` and `outputs` name its tensors.
        example: `example(n)` gives inputs of n rows, where the weights are.
        network: whose weights `run` reads.
    """

    name: str
    run: Program
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Callable[[int], tuple[Tensor, ...]]
    network: nn.Module


class Programs:
    """The pieces of a network, each run by the program of the part with its name."""

    def __init__(self, setup: Setup, programs: Mapping[str, Program]) -> None:
        self.always, self.bypasses = setup.backbone.always, setup.backbone.bypasses
        self.programs = programs

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """See Backbone."""
        return self.programs["condition"](t, label)[0]

    def enter(self, x: Tensor, condition: Tensor) -> tuple[Tensor, ...]:
        """See Pieces."""
        return tuple(self.programs["enter"](x, condition))

    def segment(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor], condition: Tensor) -> Tensor:
        """See Pieces."""
        return self.programs[_name("segment", segment)](hidden, condition, *kept)[0]

    def bypass(self, segment: Segment, hidden: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """See Pieces."""
        return self.programs[_name("bypass", segment)](hidden, *kept)[0]

    def leave(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """See Pieces."""
        return self.programs["leave"](hidden, condition)[0]


def make_programs(setup: Setup, segments: Sequence[Segment], make: Callable[[Part], Program]) -> Programs:
    """Turn every part into a program; BackendUnavailable as soon as the pace says that the deadline will be missed."""
    wanted, programs = parts(setup, segments), dict[str, Program]()
    began = first = now = time.monotonic()
    for part in wanted:
        programs[part.name] = make(part)
        now = time.monotonic()
        done, left = len(programs), len(wanted) - len(programs)
        first = now if done == 1 else first  # the first also pays for imports: no measure of the pace
        expected = now + left * (now - first) / max(done - 1, 1)
        if expected > setup.deadline:
            given = max(setup.deadline - began, 0.0)
            raise BackendUnavailable(f"building takes about {expected - began:.0f} s, {given:.0f} s are left for it")
    return Programs(setup, programs)


def example_rows(setup: Setup, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random x (N, C, H, W), t (N,) and labels (N,), the same for the same `rows`."""
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, *setup.backbone.row_shape, generator=random)
    t = torch.rand(rows, generator=random)
    label = torch.arange(rows) % (setup.backbone.null_label + 1)
    return x.to(setup.device), t.to(setup.device), label.to(setup.device)


def parts(setup: Setup, segments: Sequence[Segment]) -> list[Part]:
    """`condition`, `enter`, a part a segment and, where the backbone bypasses, a bypass, and `leave`."""
    backbone = setup.backbone

    def state(rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, t, label = example_rows(setup, rows)
        with torch.no_grad():
            condition = backbone.condition(t, label)
            return condition, backbone.enter(x, condition)

    def entering(rows: int) -> tuple[Tensor, ...]:
        return example_rows(setup, rows)[0], state(rows)[0]

    def inside(rows: int) -> tuple[Tensor, ...]:
        condition, (hidden, *kept) = state(rows)
        return hidden, condition, *kept

    def beside(rows: int) -> tuple[Tensor, ...]:
        return state(rows)[1]

    kept = [f"kept{i}" for i in range(len(beside(1)) - 1)]
    found = [
        Part(
            "condition",
            lambda t, label: (backbone.condition(t, label),),
            ("t", "label"),
            ("condition",),
            lambda rows: example_rows(setup, rows)[1:],
            backbone,
        ),
        Part("enter", backbone.enter, ("x", "condition"), ("hidden", *kept), entering, backbone),
    ]
    for segment in segments:
        inputs = ("hidden", "condition", *kept)
        found.append(Part(_name("segment", segment), _segment(setup, segment), inputs, ("out",), inside, backbone))
        if backbone.bypasses:
            inputs = ("rest", *(f"rest_{name}" for name in kept))
            found.append(Part(_name("bypass", segment), _bypass(setup, segment), inputs, ("out",), beside, backbone))
    leaving = Part(
        "leave",
        lambda hidden, condition: (backbone.leave(hidden, condition),),
        ("hidden", "condition"),
        ("output",),
        lambda rows: inside(rows)[:2],
        backbone,
    )
    return [*found, leaving]


def _name(kind: str, segment: Segment) -> str:
    return f"{kind}-{segment.start}-{segment.stop}"


def _segment(setup: Setup, segment: Segment) -> Program:
    return lambda hidden, condition, *kept: (setup.backbone.segment(segment, hidden, kept, condition),)


def _bypass(setup: Setup, segment: Segment) -> Program:
    return lambda hidden, *kept: (setup.backbone.bypass(segment, hidden, kept),)
