"""What the rows of the table cost: multiply-accumulates, parameters and measured time, relative to the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.macs import count_macs
from models.evaluation.carried import Carried, Way
from models.evaluation.served import Outputs
from models.evaluation.turns import measure_times
from models.evaluation.uncertainty import Study, cost_of_rows, time_cascade
from models.tasks.classifier import Classifier
from models.tasks.contracts import Calibration
from models.training.session import device_of

BATCHES = (32, 1)


@dataclass(frozen=True)
class Cost:
    """Of one image, relative to the source: conv + linear MACs, parameters, and time by batch, where measured."""

    macs: float
    parameters: float
    times: dict[int, float] = field(default_factory=dict)


def parameters(network: nn.Module) -> int:
    """How many numbers it learned."""
    return sum(p.numel() for p in network.parameters())


@dataclass(frozen=True, eq=False)
class Counter:
    """Counts and runs what rows name, on the members and on what was trained on them."""

    members: list[Any]
    carried: Carried
    image: tuple[int, int, int]

    def pixels(self, n: int) -> Tensor:
        """Noise (n, C, H, W), the same every time, where the members lie."""
        height, width, channels = self.image
        noise = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))
        return noise.to(device_of(self.members[0]))

    def ensemble(self, x: Tensor, size: int) -> Any:
        """The first `size` members."""
        return [member(x) for member in self.members[:size]]

    def way(self, x: Tensor, way: Way) -> Any:
        """A way's networks, after the source unless they are students."""
        if way.networks[0] in self.carried.students:
            return self.carried.students[way.networks[0]](x)
        source = self.members[0]
        tap = source.tap(x)
        late = source.features(tap)
        logits = source.fc(late)
        return [self.carried.run(name, n, x, tap, late, logits) for name, n in way.calls]

    def of_way(self, way: Way) -> Cost:
        """By counting."""
        source, x = self.members[0], self.pixels(1)
        alone = way.networks[0] in self.carried.students
        known: dict[str, Any] = self.carried.students if alone else self.carried.networks
        used = nn.ModuleList([*([] if alone else [source]), *(known[name] for name in way.networks)])
        macs, base = count_macs(used, lambda: self.way(x, way)), count_macs(source, lambda: source(x))
        return Cost(macs / base, parameters(used) / parameters(source))


@torch.inference_mode()
def costs_of(counter: Counter, batches: Iterable[int] = BATCHES) -> dict[str, Cost]:
    """Every row but the cascade's, by the first of its seeds; rows that run the same networks share a measurement."""
    ways = {name: found[0] for name, found in counter.carried.rows.items()}
    same = {name: next(n for n, w in ways.items() if w.calls == way.calls) for name, way in ways.items()}
    sizes = range(1, len(counter.members) + 1)
    found = {f"DE-{m}": Cost(float(m), float(m)) for m in sizes}
    found |= {name: counter.of_way(ways[name]) for name in dict.fromkeys(same.values())}
    for batch in batches:
        x = counter.pixels(batch)
        runs: dict[str, Callable[[], Any]] = {f"DE-{m}": partial(counter.ensemble, x, m) for m in sizes}
        runs |= {name: partial(counter.way, x, ways[name]) for name in found if name in ways}
        seconds = measure_times(runs)
        for name, cost in found.items():
            cost.times[batch] = seconds[name] / seconds["DE-1"]
    found |= {name: found[first] for name, first in same.items()}
    served = f"DE-{len(counter.members)}"
    return found | {"source": found["DE-1"], "source at T*": found["DE-1"], f"{served} served": found[served]}


def macs_on(classifier: Classifier, calibration: Calibration, rows: Outputs) -> dict[str, float]:
    """Of each served method on a split, relative to the source: `exits` as its images left, `cascade` at its default
    point."""
    costs = classifier.costs()
    if classifier.exits is not None:
        costs["exits"] = float(np.take(classifier.exits.costs, rows.left).mean())
    if (router := calibration.router) is not None:
        _, escalated = rows.cascaded(router, router.pick(None))
        costs["cascade"] = cost_of_rows(classifier, rows, escalated)
    return costs


def cost_of_cascade(counter: Counter, classifier: Classifier, found: Study, batch: int = BATCHES[0]) -> Cost | None:
    """At its default point, on test images as they leave and are escalated; None without one."""
    if (router := found.calibration.router) is None:
        return None
    _, escalated = found.test.cascaded(router, router.pick(None))
    first: Iterable[nn.Module] = classifier.bridge.networks.values() if classifier.bridge else ()
    if classifier.exits is not None:
        first = classifier.exits.networks
    held = parameters(nn.ModuleList([*counter.members, *first])) / parameters(counter.members[0])
    macs = cost_of_rows(classifier, found.test, escalated)
    return Cost(macs, held, {batch: time_cascade(classifier, found, batch)})
