"""`offramp dlq`: dead letters, that is jobs that were given up after too many deliveries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from service.broker.letters import Letter
    from service.broker.redis_streams import Broker
    from service.config import Settings

HEAD = ("id", "model", "age", "attempts", "worker", "error")
T = TypeVar("T")
Found = list[tuple[str, "Letter"]]

Model = Annotated[str, typer.Option(help="Only this model's letters.")]
OneId = Annotated[str, typer.Argument(metavar="[ID]", help="Id of the dead job.", show_default=False)]
Every = Annotated[bool, typer.Option("--all", help="All letters.")]

app = typer.Typer(help="List, show, replay or purge jobs that were given up (dead letters).", no_args_is_help=True)


@app.command("ls")
def list_letters(model: Model = "") -> None:
    """List dead letters, oldest first."""

    async def work(broker: Broker, settings: Settings) -> Found:
        return await _letters(broker, model)

    found = _run(work)
    if not found:
        typer.echo("no dead letters")
        return
    rows = [HEAD, *(_row(name, letter) for name, letter in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(job: Annotated[str, typer.Argument(metavar="ID", help="Id of the dead job.")], model: Model = "") -> None:
    """Show a dead letter: what was asked and how it ended; pictures by their size."""

    async def work(broker: Broker, settings: Settings) -> Found:
        return await _chosen(broker, model, job, False)

    [(name, letter)] = _run(work)
    said: dict[str, object] = {
        "id": letter.id,
        "model": name,
        "died": _stamp(letter.dead_ms),
        "submitted": _stamp(letter.submitted_ms),
    }
    said |= {"priority": letter.rank, "owner": letter.owner or "-", "rows": letter.rows, "cost": letter.cost}
    said |= {"attempts": letter.attempts, "worker": letter.worker or "-", "error": letter.error}
    work_asked = letter.job(letter.id).work
    said |= {f"work.{f.name}": _brief(getattr(work_asked, f.name)) for f in fields(work_asked) if f.name != "model"}
    width = max(map(len, said))
    for key, value in said.items():
        typer.echo(f"{key.ljust(width)}  {value}")


@app.command()
def replay(job: OneId = "", every: Every = False, model: Model = "") -> None:
    """Queue dead jobs again, under new ids and OFFRAMP_DEADLINE_S from now; each letter goes when its job is queued."""
    from service.broker.letters import new_id
    from service.protocol import Terms

    _one_or_all(job, every)

    async def work(broker: Broker, settings: Settings) -> int:
        found = await _chosen(broker, model, job, every)
        for name, letter in found:
            again = letter.job(new_id(name))
            budget_ms = int(settings.deadline_s * 1000)
            terms = Terms(letter.rows, budget_ms, settings.max_backlog, priority=letter.rank, owner=letter.owner)
            await broker.submit(again, terms)
            await broker.purge(name, letter.entry)
            typer.echo(f"{letter.id} -> {again.id}")
        return len(found)

    typer.echo(f"replayed {_run(work)}")


@app.command()
def purge(job: OneId = "", every: Every = False, model: Model = "") -> None:
    """Throw dead letters away."""
    _one_or_all(job, every)

    async def work(broker: Broker, settings: Settings) -> int:
        return sum([await broker.purge(name, one.entry) for name, one in await _chosen(broker, model, job, every)])

    typer.echo(f"purged {_run(work)}")


def _run(work: Callable[[Broker, Settings], Awaitable[T]]) -> T:
    """Do one command's work with a connection of its own."""
    from service.broker.redis_streams import Broker
    from service.config import load_settings
    from service.supervisor import located

    settings = located(load_settings())

    async def connected() -> T:
        broker = Broker(settings.redis_url)
        try:
            return await work(broker, settings)
        finally:
            await broker.aclose()

    return asyncio.run(connected())


async def _letters(broker: Broker, model: str) -> Found:
    """Letters of `model`, or of all models that have some."""
    names = [model] if model else await broker.models_with_letters()
    return [(name, letter) for name in names async for letter in broker.letters(name)]


async def _chosen(broker: Broker, model: str, job: str, every: bool) -> Found:
    from service.errors import NotFound

    found = await _letters(broker, model)
    if every:
        return found
    if not (one := [(name, letter) for name, letter in found if letter.id == job]):
        raise NotFound(f"no dead letter {job!r}; `offramp dlq ls` lists them")
    return one


def _one_or_all(job: str, every: bool) -> None:
    if bool(job) == every:
        raise typer.BadParameter("give either an ID or --all")


def _row(model: str, letter: Letter) -> tuple[str, ...]:
    age = max(0, int(time.time()) - letter.dead_ms // 1000)
    return letter.id, model, _span(age), str(letter.attempts), letter.worker or "-", letter.error


def _span(seconds: int) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _stamp(ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1000))


def _brief(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, tuple):
        return ", ".join(map(_brief, value)) or "-"
    return str(value)
