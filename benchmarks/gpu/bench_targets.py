"""What the figures of engine.json say of the targets."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

Target = dict[str, Any]
FULL, BALANCED = 2.0, 2.8
SAVING, OUTSIDE = 0.95, 0.10
SATURATED = 4  # times n_sat


def targets(report: Mapping[str, Any]) -> list[Target]:
    """Every target of every model, those that could not be measured with value None."""
    models = list(dict.fromkeys(name.split("/")[0] for name in report["sections"] if "/" in name))
    return [target for model in models for target in _of(model, report["sections"])]


def _of(model: str, sections: Mapping[str, Any]) -> Iterator[Target]:
    for kind in ("equal", "mixed"):
        ways = (_found(sections, f"{model}/{kind}") or {}).get("ways", {})
        full = _most(ways, "full ", "over_plain")
        balanced = _most(ways, "balanced", "over_plain")
        yield _target(model, f"full over the plain loop, {kind} steps", full, FULL, above=True)
        yield _target(model, f"balanced over the plain loop, {kind} steps", balanced, BALANCED, above=True)
        yield _target(model, f"full over the compiled plain loop, {kind} steps", _most(ways, "full ", "over_compiled"))
        yield _target(model, f"balanced over the compiled one, {kind} steps", _most(ways, "balanced", "over_compiled"))
    rows = _found(sections, f"{model}/exits") or []
    saturated = [row for row in rows if _counts(row)]
    fastest = min(saturated, key=lambda row: row["mixed_s"] / row["rows"], default={"way": None})["way"]
    shares = [row["of_layer_saving"] for row in saturated if row["way"] == fastest]
    what = f"time saved over layers saved, balanced, at {SATURATED} n_sat rows or more"
    yield _target(model, what, min(shares, default=None), SAVING, above=True)
    ticks = [row for row in _found(sections, f"{model}/ticks") or [] if row["rows"] == 1 and "cudagraph" in row["way"]]
    outside = max((row["outside_kernels"] for row in _fastest(ticks)), default=None)
    yield _target(model, "share of a tick outside kernels, one row, CUDA graphs", outside, OUTSIDE, above=False)


def _counts(row: Mapping[str, Any]) -> bool:
    return row["gear"] == "balanced" and row["rows"] >= SATURATED * row["n_sat"]


def _fastest(ticks: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the way with the shortest tick."""
    best = min(ticks, key=lambda row: row["tick_s"], default=None)
    return [row for row in ticks if best is not None and row["way"] == best["way"]]


def _found(sections: Mapping[str, Any], name: str) -> Any:
    return sections.get(name, {}).get("found")


def _most(ways: Mapping[str, Any], prefix: str, key: str) -> float | None:
    """The largest median ratio of ways whose name begins so."""
    found = [way[key]["median"] for name, way in ways.items() if name.startswith(prefix) and key in way]
    return max(found, default=None)


def _target(model: str, what: str, value: float | None, bar: float | None = None, above: bool = True) -> Target:
    """`met` is None where there is no bar or no value."""
    met = None if value is None or bar is None else value >= bar if above else value <= bar
    return {"model": model, "what": what, "value": value, "bar": bar, "met": met}


def verdict(target: Target) -> str:
    """In a word."""
    if target["value"] is None:
        return "not measured"
    return {None: "", True: "met", False: "missed"}[target["met"]]


def show(found: list[Target]) -> None:
    """One line each."""
    for target in found:
        value = "-" if target["value"] is None else f"{target['value']:.3f}"
        bar = "" if target["bar"] is None else f"{target['bar']:g}"
        print(f"{target['model']:<16} {target['what']:<70} {value:>8} {bar:>6}  {verdict(target)}")


def commit() -> str:
    """The commit, where there is a repository."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
