"""Recipes: TOML files read into frozen dataclasses, unknown or missing keys refused by name."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from models.api import UserError

T = TypeVar("T")


class RecipeError(UserError):
    """A recipe that cannot be used; the message names the key and the fix."""


def read_recipe(path: Path, kind: type[T]) -> T:
    """Read `path` as a `kind` (a frozen dataclass). Tables become nested dataclasses."""
    if not path.is_file():
        raise RecipeError(f"recipe {path} does not exist")
    return build(kind, tomllib.loads(path.read_text()), str(path))


def build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Make a dataclass from a dict; `where` prefixes error messages."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(fields))}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            made[name] = build(hint, value, f"{where}: {name}")  # type: ignore[arg-type]
        elif get_origin(hint) is tuple and isinstance(value, list):
            made[name] = tuple(value)
        elif hint is float and isinstance(value, int) and not isinstance(value, bool):
            made[name] = float(value)
        elif isinstance(hint, type) and not isinstance(value, hint):
            raise RecipeError(f"{where}: {name} must be {hint.__name__}, got {value!r}")
        else:
            made[name] = value
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise RecipeError(f"{where}: {name} is missing")
    return kind(**made)
