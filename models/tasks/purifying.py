"""Images that are purified before they are classified: a few a tick, so that a slow denoiser does not stall the others.

The purifier is a generator beside the ensemble, named in the ensemble's config.json:
`"purifier": {"model": "fashion-dit", "u": 0.3, "steps": 1, "gear": "full"}`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.api import ClassifiedRow, ClassifyWork, ModelInfo, PurifierInfo, UserError
from models.methods.interface import Answer, Plain
from models.purification.purify import Dose, Purifier, image_keys
from models.registry import METHODS, resolve
from models.store import StoreError
from models.uncertainty.scores import describe

log = logging.getLogger(__name__)


def load_purifier(ensemble: Path, config: Mapping[str, Any]) -> Purifier | None:
    """The purifier that an ensemble's config names, one draw; None where it names none, or one that is not here.

    Raises:
        StoreError: the entry is malformed, or its generator cannot purify the ensemble's images.
    """
    if (entry := config.get("purifier")) is None:
        return None
    where = f"{ensemble}/config.json: purifier"
    try:
        name, gear = str(entry["model"]), str(entry["gear"])
        dose = Dose(u=float(entry["u"]), steps=int(entry["steps"]), draws=1)
    except UserError as error:
        raise StoreError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{where}: needs model, u, steps and gear: {error!r}") from error
    if Path(name).name != name:
        raise StoreError(f"{where}: model {name!r} must be the name of a folder beside the ensemble")
    folder = ensemble.parent / name
    if not (folder / "config.json").is_file():
        log.warning("purification is not offered: %s is not there", folder)
        return None
    return Purifier.load(folder, config["image"], dose, gear)


def purifier_info(purifier: Purifier, entry: Mapping[str, Any], methods: Iterable[str], single: int) -> PurifierInfo:
    """What is advertised of a purifier of one draw, still on the CPU; `single`: multiply-accumulates of the source."""
    cost, whole = purifier.cost(single), tuple(name for name in methods if runs_whole(resolve(METHODS, name)))
    dose = purifier.dose
    return PurifierInfo(entry["model"], entry["gear"], dose.u, dose.steps, cost, math.ceil(cost), whole)


def runs_whole(method: type[Any]) -> bool:
    """Whether every row runs the method's whole plan, so that several draws of an image end together."""
    return issubclass(method, Plain) and method.finished is Plain.finished


def check_purify(work: ClassifyWork, info: ModelInfo) -> None:
    """Refuse what the model cannot purify, naming purify or alpha."""
    offered = info.purifier.methods if info.purifier else ()
    if work.method not in offered:
        raise UserError(f"{info.name} purifies for {', '.join(offered) or 'no method'}: drop purify", "purify")
    if work.alpha is not None:
        raise UserError("prediction sets do not hold for purified images: drop alpha, or purify", "alpha")


def mean_of(draws: Answer) -> ClassifiedRow:
    """One image's answer from those of its draws; no contract was fitted to it."""
    p = draws.p.mean(0, keepdims=True)
    scores = describe(p, float(draws.scores["temperature"][0]))
    return ClassifiedRow(tuple(p[0].tolist()), {key: float(values[0]) for key, values in scores.items()})


def purified_receipt(work: ClassifyWork, info: ModelInfo) -> dict[str, Any]:
    """What denoiser and classifications of all draws cost."""
    assert info.purifier is not None
    assert work.purify is not None
    cost = work.purify * (info.purifier.cost + info.methods[work.method])
    dose = {"u": info.purifier.u, "steps": info.purifier.steps, "draws": work.purify}
    return {"method": work.method, "cost_vs_single": cost, "purified": dose}


@dataclass(eq=False)
class Purified:
    """One image on its way: states (draws, C, H, W) after `done` calls of the denoiser; at last its answer."""

    states: Tensor
    done: int = 0
    row: ClassifiedRow | None = None


class PurifyStage:
    """Rows that are purified, by slot, first come first.

    `batch`: network rows (draws) to move in a tick, but for an image that has more by itself.
    """

    def __init__(self, purifier: Purifier | None, batch: int) -> None:
        self.purifier, self.batch = purifier, batch
        self.images: dict[int, Purified] = {}

    def forget(self, slots: Iterable[int]) -> None:
        """Slots that were given to new rows."""
        for slot in slots:
            self.images.pop(slot, None)

    def enter(self, slots: Sequence[int], pixels: Tensor, images: Iterable[bytes], draws: int) -> int:
        """Noise new rows, by their bytes; returns the ticks to come: a denoiser's call each, and one to classify."""
        assert self.purifier is not None
        dose = replace(self.purifier.dose, draws=draws)
        states = replace(self.purifier, dose=dose).begin(pixels, image_keys(images).to(pixels.device))
        self.images |= {slot: Purified(state) for slot, state in zip(slots, states, strict=True)}
        return self.purifier.calls + 1

    def choose(self, slots: Iterable[int]) -> list[int]:
        """Which of `slots` to move now, those that came first; at least one, where any is purified."""
        listed, chosen, left = set(slots), list[int](), self.batch
        for slot in (slot for slot in self.images if slot in listed):
            left -= len(self.images[slot].states)
            if chosen and left < 0:
                break
            chosen.append(slot)
        return chosen

    def denoise(self, slots: Sequence[int]) -> dict[int, Tensor]:
        """One call of the denoiser for those of these rows that have some to come: their states, not kept yet."""
        if not (noisy := {slot: self.images[slot] for slot in slots if not self._clean(slot)}):
            return {}
        assert self.purifier is not None
        states = torch.cat([image.states for image in noisy.values()])[:, None]
        moved = self.purifier.step(states, [image.done for image in noisy.values() for _ in image.states])[:, 0]
        parts = moved.split([len(image.states) for image in noisy.values()])
        return dict(zip(noisy, parts, strict=True))

    def finish(self, slots: Sequence[int]) -> dict[int, Tensor]:
        """Purified pixels (draws, C, H, W) in [0, 1] of those of these rows that have made all their calls."""
        clean = [slot for slot in slots if self._clean(slot)]
        return {slot: self.purifier.finish(self.images[slot].states) for slot in clean if self.purifier}

    def keep(self, states: Mapping[int, Tensor], answers: Mapping[int, ClassifiedRow]) -> None:
        """Commit what a tick made: states after one more call, answers."""
        for slot, moved in states.items():
            image = self.images[slot]
            image.states, image.done = moved, image.done + 1
        for slot, row in answers.items():
            self.images[slot].row = row

    def _clean(self, slot: int) -> bool:
        return self.purifier is not None and self.images[slot].done == self.purifier.calls
