"""A classifier's networks as parts that a backend can run: functions of tensors, rows first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.api import Runtime
from models.backbones.bridge import BridgeNetwork
from models.backbones.distance import FeatureDistance
from models.backbones.early_exits import ExitStage
from models.backbones.folding import fold
from models.backbones.resnet import ResNet
from models.backends.independent import Programs, build
from models.backends.interface import Place
from models.backends.parts import Part, Program
from models.bridge.process import source
from models.methods.interface import SOURCE, STUDENT, bridge_name, exit_name, member_name

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.exits import EarlyExits


def parts(classifier: Classifier) -> list[Part]:
    """The source first: pixels -> tap, pooled features, logits; members and student: pixels -> logits.

    Bridges: tap, z, step, features -> u. Exits: pixels, or what the exit before left -> that for the next, logits;
    the last one leaves the source's own logits. Where the classifier has a distance, the source and a first exit that
    sees the tap also return it.
    Examples lie where the source's weights lie.
    """
    first, *others = classifier.members
    height, width, channels = classifier.config["image"]

    def pixels(rows: int) -> tuple[Tensor]:
        x = torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(rows))
        return (x.to(first.fc.weight.device),)

    def state(rows: int, steps: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            tap, features, logits, *_ = see(first)(*pixels(rows))
        step = 1 + torch.arange(rows, device=logits.device) % steps
        return tap, source(logits, classifier.softening), step, features

    found = [Part(SOURCE, see(first), ("x",), ("tap", "features", "logits"), pixels, first)]
    if classifier.distance is not None:
        far = classifier.distance.network
        outputs = (*found[0].outputs, "distance")
        found = [replace(found[0], run=see(first, far), outputs=outputs, network=nn.ModuleList([first, far]))]
    direct = {member_name(i): member for i, member in enumerate(others, 1)}
    if classifier.student is not None:
        direct[STUDENT] = classifier.student.network
    for name, network in direct.items():
        found.append(Part(name, forward(network), ("x",), ("logits",), pixels, network))
    light = {name: network for bridge in classifier.bridges.values() for name, network in bridge.networks.items()}
    for name, bridge in light.items():
        inputs, example = ("tap", "z", "step", "features"), partial(state, steps=bridge.config.steps)
        found.append(Part(bridge_name(name), carry(bridge), inputs, ("u",), example, bridge))
    if classifier.exits is not None:
        found += exits(classifier.exits, pixels)
    return found


def exits(served: EarlyExits, pixels: Callable[[int], tuple[Tensor, ...]]) -> list[Part]:
    """Every exit; `pixels` is an example of what the first one sees."""
    found, before = [], pixels
    for stage, network in zip(served.stages, served.networks, strict=True):
        last = stage == served.stages[-1]
        outputs = ("source_logits" if last else "h", "logits", *(["distance"] if network.distance else []))
        found.append(Part(exit_name(stage), answer(network) if last else network, ("x",), outputs, before, network))
        before = partial(left_by, network, before)
    return found


def see(network: ResNet, distance: FeatureDistance | None = None) -> Program:
    """The source as a function of pixels, with the distance of its tap."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        tap = network.tap(x)
        features = network.features(tap)
        seen = tap, features, network.fc(features)
        return seen if distance is None else (*seen, distance(tap))

    return run


def forward(network: ResNet) -> Program:
    """A network as a function of pixels."""
    return lambda x: (network(x),)


def carry(network: BridgeNetwork) -> Program:
    """A bridge as a function of all that any of them may see."""
    return lambda tap, z, step, features: (network(tap, z, step, features),)


def answer(network: ExitStage) -> Program:
    """The last exit as a function of what came before: the source's logits, the head's."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        h, logits, *_ = network(x)
        return network.stages.source.fc(h.mean(dim=(2, 3))), logits

    return run


@torch.no_grad()
def left_by(network: ExitStage, before: Callable[[int], tuple[Tensor, ...]], rows: int) -> tuple[Tensor]:
    """What an exit leaves of the example that was `before` it."""
    return (network(*before(rows))[0],)


def run_by(classifier: Classifier, slots: int, device: torch.device, runtime: Runtime) -> tuple[Programs, str]:
    """Programs of the networks, their BatchNorms folded, and a note on what runs them.

    Channels last is the faster layout of small convolutions on CPUs; bits of a row may depend on it, numbers do not.
    """
    found = parts(classifier)
    for part in found:
        fold(part.network).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    place = Place(
        weights=classifier.networks_digest,
        rows=max(slots, 2),
        device=device,
        cache=Path(runtime.cache),
        budget_s=runtime.budget_s,
    )
    return build(runtime.backend, found, place)
