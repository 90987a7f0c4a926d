"""calibration.json of an ensemble folder: what each method promises, tied to the weights that it is true of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.store import StoreError, read_json, write_json
from models.tasks.classifier import Classifier
from models.uncertainty.contract import Contract
from models.uncertainty.decision import Thresholds
from models.uncertainty.router import Router

NAME = "calibration.json"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Contracts by method, the cascade's router where there is a cascade, and `foreign`, the rule on the feature
    distance that all of them hold, where it is measured."""

    methods: dict[str, Contract] = field(default_factory=dict)
    router: Router | None = None
    foreign: Thresholds | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        methods = {name: contract.to_json() for name, contract in self.methods.items()}
        cascade = None if self.router is None else self.router.to_json()
        return {"methods": methods, "cascade": cascade, "foreign": self.foreign.to_json() if self.foreign else None}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Calibration:
        """The inverse of `to_json`; UserError, KeyError, TypeError or ValueError on what is not one."""
        foreign = Thresholds.from_json(found["foreign"]) if found.get("foreign") else None
        methods = {name: Contract.from_json(value, foreign) for name, value in found["methods"].items()}
        router = None if found["cascade"] is None else Router.from_json(found["cascade"], foreign)
        return cls(methods, router, foreign)


def write_calibration(folder: Path, classifier: Classifier, calibration: Calibration) -> None:
    """Keep a calibration with the model."""
    write_json(folder / NAME, {"of": classifier.fingerprint, **calibration.to_json()})


def read_calibration(folder: Path, classifier: Classifier) -> Calibration:
    """The folder's calibration, without any method where there is no file.

    Raises:
        StoreError: a malformed file, or one that was fitted on other weights or temperatures.
    """
    path = folder / NAME
    if not path.is_file():
        return Calibration()
    found, again = read_json(path), "run `offramp eval classify --write` again, or remove the file"
    try:
        calibration, of = Calibration.from_json(found), found["of"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({error!r}): {again}") from error
    if of != classifier.fingerprint:
        raise StoreError(f"{path} was fitted on other weights or temperatures: {again}")
    return calibration
