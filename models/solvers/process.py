"""The `process` table of a model's config.json, as one of the diffusion processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from models.api import SolverName, UserError
from models.registry import SOLVERS, resolve
from models.solvers.base import DATA, Point, Process
from models.solvers.edm import EDM
from models.solvers.flow import Flow
from models.solvers.vp import VPSDE, Cosine, Discrete

__all__ = ["DATA", "EDM", "VPSDE", "Cosine", "Discrete", "Flow", "Point", "Process", "from_config", "solvers_for"]

KINDS: dict[str, type[Process]] = {c.kind: c for c in (Cosine, Discrete, VPSDE, EDM, Flow)}


def from_config(table: Mapping[str, Any]) -> Process:
    """The process of a model; `kind` is cosine if absent, the other keys are the fields of the process's class.

    Raises:
        UserError: an unknown, missing or impossible key, by name.
    """
    kind = table.get("kind", Cosine.kind)
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UserError(f"process.kind: {kind!r} is not one of {', '.join(KINDS)}")
    given = {key: value for key, value in table.items() if key != "kind"}
    hints = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    for key, value in given.items():
        if key not in hints:
            raise UserError(f"process.{key}: the {kind} process has no such key; it has {', '.join(hints)}")
        if not _fits(value, hints[key]):
            raise UserError(f"process.{key}: {value!r} does not fit; needed: {_words(hints[key])}")
    for f in fields(cls):
        if f.name not in given and f.default is MISSING:
            raise UserError(f"process.{f.name}: missing; the {kind} process needs it")
    return cls(**given)


def solvers_for(process: Process) -> tuple[SolverName, ...]:
    """The registered solvers that fit the process."""
    return tuple(name for name in get_args(SolverName) if name in SOLVERS and resolve(SOLVERS, name).fits(process))


def _fits(value: object, hint: Any) -> bool:
    """Whether a JSON value has the type of a field."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping)
    if hint is bool or hint is type(None):
        return isinstance(value, hint)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (hint is float or isinstance(value, int))


def _words(hint: Any) -> str:
    """A field's type for a message."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    names = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
    return names.get(hint, "a table")
