"""Method bridge: the source, and light networks that carry its logits to the ensemble's.

Kim et al., "Fast Ensembling with Diffusion Schroedinger Bridge" (ICLR 2024). With one network and no source weight
the estimate is the network's; with several it is their mean, which holds the source once for each of them (every
bridge starts from it) and is freed of that by `mixture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from models.bridge.mixture import mixture
from models.bridge.process import posterior_mean
from models.methods.interface import Answer, Floats, Plain, Plan, Rows, Slots, bridge_name, log_probabilities
from models.uncertainty.scores import against_source, describe, soften

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


@dataclass(frozen=True)
class Step:
    """One evaluation of a bridge at step `n` of T = `steps`, on `z[:, column]`; a `leap` goes to the end at once."""

    network: str
    column: int
    n: int
    steps: int
    leap: bool

    def run(self, pool: Rows, rows: Tensor, calls: Sequence[Self]) -> None:
        """See Call; each row at its own n."""
        said = np.array([(call.column, call.n, call.leap) for call in calls], np.int64).T
        columns, n, leap = pool.uplink.send(*said)
        z = pool.z[rows, columns]
        (u,) = pool.networks[self.network](pool.taps[rows], z, n, pool.features[rows])
        pool.z[rows, columns] = torch.where(
            leap[:, None] > 0, z - u, posterior_mean(z, u, n[:, None].float(), self.steps)
        )


class Bridge(Plain):
    """The entry `name` of what a bridge folder serves."""

    name = "bridge"

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__(classifier, calibration)
        self.bridge = classifier.bridges[self.name]
        self.source_temperature = classifier.temperatures["single"]

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """Every network from T down to 1, or once at T; one network after the other."""
        if (bridge := classifier.bridges.get(cls.name)) is None:
            return None
        calls = []
        for column, (name, network) in enumerate(bridge.networks.items()):
            steps = network.config.steps
            for n in range(steps, steps - bridge.evaluations, -1):
                calls.append(Step(bridge_name(name), column, n, steps, bridge.evaluations == 1))
        return Plan(tuple(calls))

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The estimate of the ensemble, and how it differs from the source."""
        p = self.estimate(pool, slots)
        source_p = soften(log_probabilities(pool.logits[slots, 0]), self.source_temperature)
        return [Answer(slots, p, describe(p, self.bridge.temperature) | against_source(p, source_p))]

    def estimate(self, pool: Rows, slots: Slots) -> Floats:
        """Calibrated probabilities (N, K) of rows whose bridges have arrived."""
        log_p = log_probabilities(pool.z[slots, : len(self.bridge.networks)])
        source_log_p = log_probabilities(pool.logits[slots, 0])
        return soften(mixture(log_p, source_log_p, self.bridge.source_weight), self.bridge.temperature)
