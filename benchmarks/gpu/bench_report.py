"""The Markdown section for benchmarks/RESULTS.md from what a GPU run left.

    python -m benchmarks.gpu.bench_report FILE [FILE ...]

Knows engine.json and road.json by their `benchmark`; prints to stdout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench_targets import verdict

Lines = Iterator[str]


def grid(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Lines:
    """A Markdown table."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def head(found: Mapping[str, Any], command: str) -> Lines:
    machine = found["machine"]
    card = machine.get("name", machine.get("device", "CPU"))
    torch = f"torch {machine['torch']}, " if "torch" in machine else ""
    yield f"## {command}, {found['date']}, {card}, {torch}commit {found['commit']}"
    yield ""


def engine(found: Mapping[str, Any]) -> Lines:
    """engine.json."""
    yield from head(found, "gpu/bench_engine.py")
    if limits := _of(found, "limits"):
        copy, launch = limits["copy_bytes_per_s"] / 1e12, 1e6 * limits["launch_s"]
        rates = ", ".join(f"{k} {limits[f'{k}_flop_per_s'] / 1e12:.0f}" for k in ("bf16", "fp16", "tf32", "fp32"))
        yield f"Measured limits: copies {copy:.2f} TB/s, matrix products (TFLOP/s) {rates}, a launch {launch:.1f} us."
        yield ""
    yield from grid(
        ("model", "target", "found", "bar", ""),
        [
            (t["model"], t["what"], _number(t["value"]), "" if t["bar"] is None else f"{t['bar']:g}", verdict(t))
            for t in found.get("targets", [])
        ],
    )
    for model in dict.fromkeys(name.split("/")[0] for name in found["sections"] if "/" in name):
        yield f"### {model}"
        yield ""
        for kind, lines in SECTIONS.items():
            section = found["sections"].get(f"{model}/{kind}", {})
            if "error" in section:
                yield f"`{kind}` failed: {section['error'].strip().splitlines()[-1]}"
                yield ""
            elif section.get("found"):
                yield from lines(section["found"])


def _network(found: Mapping[str, Any]) -> Lines:
    rows = []
    for way, one in found["ways"].items():
        single, share = one["seconds"].get("1"), max(one["share_of_matmul"].values())
        rows.append((way, one["n_sat"], _micro(single), _micro(one["least_row_s"]), f"{share:.1%}"))
    yield "Network at full depth:"
    yield ""
    yield from grid(("way", "n_sat", "one row, us", "least a row, us", "of the matrix limit"), rows)
    for way, fault in found["faults"].items():
        yield f"{way} could not be built: {fault}"
        yield ""


def _ticks(found: Sequence[Mapping[str, Any]]) -> Lines:
    yield "Ticks:"
    yield ""
    yield from grid(
        ("way", "rows", "guidance", "ticks / s", "device us", "kernels", "outside kernels"),
        [
            (
                *(r["way"], r["rows"], f"{r['guidance']:g}", f"{r['ticks_per_s']:.0f}", _micro(r["device_s"])),
                *(f"{r['kernels']:.0f}", f"{r['outside_kernels']:.1%}"),
            )
            for r in found
        ],
    )
    dearest = found[0]["top"][:5] if found else []
    yield f"Dearest kernels of {found[0]['way']} at one row: " + "; ".join(f"{k['name']} {k['us']} us" for k in dearest)
    yield ""


def _exits(found: Sequence[Mapping[str, Any]]) -> Lines:
    yield "Batches of mixed depths:"
    yield ""
    yield from grid(
        ("way", "gear", "rows", "of n_sat", "time saved", "layers saved", "share", "over the mean of depths"),
        [
            (
                *(r["way"], r["gear"], r["rows"], f"{r['rows'] / r['n_sat']:g}", _number(r["time_saving"])),
                *(_number(r["layer_saving"]), _number(r["of_layer_saving"]), _number(r["over_ideal"])),
            )
            for r in found
        ],
    )


def _quality(found: Mapping[str, Any]) -> Lines:
    yield "Images at full depth beside a plain float32 loop's, in levels:"
    yield ""
    rows = [(way, _number(one["mean"]), f"{one['over_1']:.2%}", one["most"]) for way, one in found.items()]
    yield from grid(("way", "mean", "off by more than 1", "most"), rows)


def _throughput(found: Mapping[str, Any]) -> Lines:
    low, high = found["steps"]
    what = f"{low} steps" if low == high else f"{low} to {high} steps"
    yield f"{found['requests']} requests of {what}, guided, batch or slots {found['batch']}, {found['turns']} turns:"
    yield ""
    yield from grid(
        ("way", "images / s", "over the plain loop", "over the compiled one"),
        [
            (way, f"{one['images_per_s']:.0f}", _spread(one["over_plain"]), _spread(one.get("over_compiled")))
            for way, one in found["ways"].items()
        ],
    )


def _engine(found: Mapping[str, Any]) -> Lines:
    yield f"With scheduler, gears and metrics around it: {found['ticks_per_s']:.0f} ticks / s at one row, unguided."
    yield ""


def _batch(found: Mapping[str, Any]) -> Lines:
    yield f"Images / s by batch, 20 steps, guided, full depth (batch {found['chosen']} is used below):"
    yield ""
    by_batch = found["images_per_s"]
    sizes = list(by_batch["plain"])
    rows = [
        (way, *(f"{speeds[size]:.0f}" if size in speeds else "-" for size in sizes)) for way, speeds in by_batch.items()
    ]
    yield from grid(("way", *sizes), rows)


def _load(found: Mapping[str, Any]) -> Lines:
    yield "Poisson arrivals at 80 % of each one's capacity:"
    yield ""
    yield from grid(
        ("way", "offered / s", "answered / s", "p50 ms", "p99 ms", "requests"),
        [
            (
                *(way, f"{one['offered_per_s']:.1f}", f"{one['per_s']:.1f}"),
                *(f"{1000 * one['p50_s']:.1f}", f"{1000 * one['p99_s']:.1f}", one["requests"]),
            )
            for way, one in found.items()
        ],
    )


SECTIONS: dict[str, Callable[[Any], Lines]] = {
    **{"network": _network, "ticks": _ticks, "exits": _exits, "quality": _quality},
    **{"engine": _engine, "batch": _batch, "equal": _throughput, "mixed": _throughput, "load": _load},
}


def road(found: Mapping[str, Any]) -> Lines:
    """road.json."""
    yield from head(found, "gpu/road.py")
    yield f"`offramp up` with {found['settings']}; {found['seconds']:g} s of load."
    yield ""
    yield from grid(
        ("what", "offered / s", "answered / s", "p50 ms", "p99 ms", "in time", "answers"),
        [
            (
                *(row["what"], f"{row['offered_per_s']:.1f}", f"{row['ok_per_s']:.1f}"),
                *(f"{row['p50_ms']:.1f}", f"{row['p99_ms']:.1f}", f"{row['in_time']:.1%}", row["statuses"]),
            )
            for row in found["loads"]
        ],
    )
    yield f"Layer evaluations saved: {_number(found['compute_saved'])}; mean exit depth {_number(found['mean_depth'])}."
    yield ""


def _of(found: Mapping[str, Any], name: str) -> Any:
    return found["sections"].get(name, {}).get("found")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.2f}"


def _spread(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def markdown(path: Path) -> str:
    """The section of one file."""
    found = json.loads(path.read_text())
    return "\n".join({"engine": engine, "road": road}[found["benchmark"]](found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        print(markdown(path))


if __name__ == "__main__":
    main()
