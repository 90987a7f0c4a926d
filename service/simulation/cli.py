"""`offramp simulate`: what the service would do with a trace, on a simulated clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.api import ModelInfo
    from service.simulation.profiles import Points
    from service.simulation.traces import Arrival

RATE = "requests per second, or `2x`: times what all workers can do in the best gear"
PATIENCE = 3


def simulate(
    trace: Annotated[Path | None, typer.Option(help="File of arrivals, JSON lines (docs/gears.md).")] = None,
    poisson: Annotated[str, typer.Option(help=f"Poisson arrivals: {RATE}.")] = "",
    bursts: Annotated[str, typer.Option(help=f"Poisson arrivals, 5 s of 1.75 and 5 s of 0.25 times: {RATE}.")] = "",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of drawn arrivals.")] = 60.0,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Rows in flight of a worker.")] = 64,
    gears: Annotated[str, typer.Option(help="on; off: each request in its best, as OFFRAMP_ADAPT=false; both.")] = "on",
    floor: Annotated[str, typer.Option(help="Floor of drawn arrivals.")] = "",
    rows: Annotated[int, typer.Option(min=1, help="Images of a drawn arrival.")] = 1,
    deadline: Annotated[
        str,
        typer.Option(help="Milliseconds, where an arrival has none; `3x`: times one image alone, in the best gear."),
    ] = f"{PATIENCE}x",
    max_backlog: Annotated[int, typer.Option(min=1, help="As OFFRAMP_MAX_BACKLOG.")] = 500_000,
    noise: Annotated[float, typer.Option(min=0.0, help="Standard deviation of log tick times.")] = 0.0,
    seed: int = 0,
    model: Annotated[str, typer.Option(help="A generator: folder, or name in the zoo.")] = "fashion-dit",
    profile: Annotated[Path | None, typer.Option(help="Tick times that --measure wrote; else shipped ones.")] = None,
    ticks: Annotated[str, typer.Option(help="Tick times: units:milliseconds, comma separated.")] = "",
    measure: Annotated[Path | None, typer.Option(help="Measure tick times, write them here (needs torch).")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the arrivals, as --trace reads them.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of latencies and rungs (needs matplotlib).")] = None,
) -> None:
    """Run the scheduler and the gears against a trace on a simulated clock. The last line is JSON."""
    from models.api import UserError
    from models.registry import DESCRIPTIONS, TASKS, resolve
    from service.simulation import report
    from service.simulation.fleet import Fleet, Terms
    from service.simulation.profiles import write_profile
    from service.simulation.traces import write_trace

    folder = _folder(model)
    if measure:
        from models.api import Runtime
        from service.worker.warmup import tick_times

        task = resolve(TASKS, "generate")(folder, slots, "auto", Runtime())
        write_profile(measure, tick_times(task, 30.0), f"{task.info.name}, {task.info.backend}, {task.device}")
        return
    ways = {"on": {"gears on": True}, "off": {"gears off": False}, "both": {"gears on": True, "gears off": False}}
    if gears not in ways:
        raise UserError(f"--gears {gears!r}: on, off or both")
    info: ModelInfo = resolve(DESCRIPTIONS, "generate")(folder)
    points, of = _points(profile, ticks)
    alone_ms, most = _measures(info, points, slots)
    deadline_ms = max(1, round(_times("--deadline", deadline, alone_ms)))
    arrivals = _arrivals(trace, poisson, bursts, seconds, seed, workers * most / rows, floor, rows)
    if save:
        write_trace(save, arrivals)
    fleets = {
        name: Fleet(info, points, Terms(workers, slots, deadline_ms, max_backlog, adapt, noise, seed))
        for name, adapt in ways[gears].items()
    }
    seen = {name: fleet.run(arrivals) for name, fleet in fleets.items()}
    runs = {name: report.summary(fleet, seen[name]) for name, fleet in fleets.items()}
    print(f"{info.name}, {workers} workers of {slots} slots; tick times: {of}")
    print(f"best gear: {workers * most:.4g} images / s, one alone {alone_ms:.4g} ms; usual deadline {deadline_ms} ms\n")
    print(report.table(runs) + "\n")
    if plot:
        report.plot(seen, fleets, [gear.name for gear in info.gears], plot)
    told = {name: run | {"seconds": report.series(fleets[name], seen[name])} for name, run in runs.items()}
    print(json.dumps({"simulated": info.name, "ticks": of, "deadline_ms": deadline_ms, "runs": told}))


def _folder(model: str) -> Path:
    from importlib.resources import files

    shipped = Path(str(files("models") / "zoo")) / model
    return shipped if shipped.is_dir() else Path(model)


def _points(profile: Path | None, ticks: str) -> tuple[Points, str]:
    from service.simulation.profiles import SHIPPED, parse_ticks, read_profile

    return (parse_ticks(ticks), "--ticks") if ticks else read_profile(profile or SHIPPED)


def _measures(info: ModelInfo, points: Points, slots: int) -> tuple[float, float]:
    """Of the best gear: milliseconds of one image alone, and images per second of a worker whose slots are full."""
    from models.api import planned_blocks
    from service.ladders import rungs_of
    from service.worker.gears import TickTime

    best, time = next(gear for gear in info.gears if gear.name == rungs_of(info)[0]), TickTime(points)
    blocks = planned_blocks(best, best.steps, best.guidance, best.solver, best.guidance_interval)
    return sum(map(time.ms, blocks)), 1000 * slots / sum(time.ms(slots * units) for units in blocks)


def _times(name: str, text: str, unit: float) -> float:
    """A number, or `2x`: times `unit`."""
    from models.api import UserError

    try:
        value = float(text[:-1]) * unit if text.endswith("x") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name} {text!r}: a number above 0, or one with an x behind it")
    return value


def _arrivals(
    trace: Path | None, poisson: str, bursts: str, seconds: float, seed: int, most: float, floor: str, rows: int
) -> list[Arrival]:
    from models.api import UserError
    from service.simulation import traces

    if sum(map(bool, (trace, poisson, bursts))) != 1:
        raise UserError("one of --trace FILE, --poisson RATE, --bursts RATE is needed")
    if trace:
        return traces.read_trace(trace)
    drawn: Any = traces.poisson if poisson else traces.bursts
    times = drawn(_times("--poisson" if poisson else "--bursts", poisson or bursts, most), seconds, seed)
    if not times:
        raise UserError(f"no arrival in {seconds:g} s: raise the rate or --seconds")
    least = float(floor) if floor.replace(".", "", 1).isdigit() else floor or None
    return traces.asking(times, traces.Arrival(0.0, rows, floor=least))
