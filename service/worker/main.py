"""The worker process: load the models, run the engines in turn, drain on SIGTERM."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from secrets import token_hex
from types import FrameType
from typing import Any

from models.api import Runtime, Task
from models.registry import TASKS, resolve
from service.config import ConfigError, Settings
from service.metrics import WorkerMetrics
from service.worker.engine import Engine
from service.worker.io import WorkerIO
from service.worker.shadow import Shadow
from service.worker.splitting import is_lost
from service.worker.warmup import tick_times

TASK_OF_KIND = {"generator": "generate", "ensemble": "classify", "drill": "drill"}
IDLE_S = 0.25
log = logging.getLogger(__name__)


class Stop:
    """SIGTERM or SIGINT asks for a drain; the second one exits at once and leaves entries to redelivery."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def run(settings: Settings) -> int:
    """Serve every model folder until drained; the exit status (0 drained, 1 broken).

    Raises:
        ConfigError: no models, a folder that does not load, no torch, or the metrics port taken.
    """
    stop = Stop()
    spare = max(1, (os.cpu_count() or 2) - 1)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads or os.environ.get("OMP_NUM_THREADS") or spare)
    worker = f"{socket.gethostname()}-{os.getpid()}-{token_hex(2)}"
    metrics = WorkerMetrics()
    tasks = load_tasks(settings)
    engines = [
        Engine(task, metrics, checkpoint_ticks=settings.checkpoint_ticks, points=tick_times(task), adapt=settings.adapt)
        for task in tasks
    ]
    for task in tasks:
        metrics.declare(task.info, str(getattr(task, "device", settings.device)))
    _serve_metrics(metrics, settings)
    wake = threading.Event()
    io = WorkerIO(settings.redis_url, worker, engines, settings, metrics, wake.set)
    io.start()
    log.info("serving", extra={"worker": worker, "models": ",".join(engine.name for engine in engines)})
    try:
        loop(engines, io, stop, wake, Shadow(engines, metrics, settings.shadow_share))
    except RuntimeError as error:
        if not is_lost(error):
            raise
        log.error("device lost, entries are left to redelivery", exc_info=error)
        return 1
    if io.error is not None:
        log.error("worker broken, entries are left to redelivery", exc_info=io.error)
        return 1
    log.info("drained", extra={"worker": worker})
    return 0


def loop(engines: Sequence[Engine], io: WorkerIO, stop: Stop, wake: threading.Event, shadow: Shadow) -> None:
    """One tick for each engine that has work, in turn, until the io thread has ended; shadows when none has."""
    draining = False
    while io.alive():
        if stop.asked and not draining:
            draining = True
            log.info("draining", extra={"busy": ",".join(engine.name for engine in engines if not engine.idle())})
            io.drain()
        wake.clear()
        busy = [engine for engine in engines if not engine.idle()]
        for engine in busy:
            tick = engine.tick()
            io.report(engine, tick)
            shadow.seen(engine, tick.finished)
        for engine in engines:
            engine.rest()
        if busy:
            shadow.abandon()
        elif draining or not shadow.step():
            wake.wait(IDLE_S)


def model_folders(settings: Settings) -> list[tuple[Path, str]]:
    """Folders to serve with the task of each; bridges are found by the classifier that they belong to."""
    root = settings.models or Path(str(files("models") / "zoo"))
    if not root.is_dir():
        raise ConfigError(f"OFFRAMP_MODELS={str(root)!r} is not a folder: name a folder of model folders")
    found = []
    for path in sorted(root.glob("*/config.json")):
        try:
            kind = json.loads(path.read_text())["kind"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no model configuration ({error!r}): repair or remove its folder") from None
        if kind in TASK_OF_KIND:
            found.append((path.parent, TASK_OF_KIND[kind]))
    if not found:
        raise ConfigError(f"no model in {root}: set OFFRAMP_MODELS to a folder of model folders (docs/settings.md)")
    return found


def load_tasks(settings: Settings) -> list[Task[Any, Any]]:
    """Every model of the settings, loaded on its device with its slots."""
    tasks: dict[str, Task[Any, Any]] = {}
    runtime = Runtime(
        settings.backend,
        settings.backend_budget_s,
        str(settings.cache_dir.resolve()),
        settings.force_schedules,
        settings.precision,
    )
    for folder, name in model_folders(settings):
        try:
            task = resolve(TASKS, name)(folder, settings.slots, settings.device, runtime)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "safetensors"):
                raise
            raise ConfigError(f"{error.name} is not installed: pip install 'offramp[cpu]' or 'offramp[gpu]'") from None
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            raise ConfigError(f"{folder} does not load: {type(error).__name__}: {error}") from None
        if task.info.name in tasks:
            raise ConfigError(f"two model folders are named {task.info.name!r}: {folder} is the second; rename one")
        tasks[task.info.name] = task
        said = {"model": task.info.name, "folder": folder, "weights": task.info.weights[:12]}
        log.info("model loaded", extra=said | {"backend": task.info.backend})
    return list(tasks.values())


def _serve_metrics(metrics: WorkerMetrics, settings: Settings) -> None:
    host, port = settings.worker_host, settings.worker_metrics_port
    try:
        metrics.serve(host, port)
    except OSError as error:
        raise ConfigError(f"OFFRAMP_WORKER_METRICS_PORT={port} on {host}: {error}; choose another") from None
