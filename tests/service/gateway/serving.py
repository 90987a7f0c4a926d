"""A gateway under a real uvicorn, and a worker's double that answers from a function instead of a network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from models.api import CascadePoint, DecisionRule, ExitSchedule, Gear, GenerateWork, ModelInfo, PurifierInfo, SetRule
from service.broker.redis_streams import Broker
from service.config import Settings
from service.errors import Unavailable
from service.gateway.app import create_app
from service.protocol import ClassifyJob, Delivery, EncodedImage, Failure, GenerateJob, Prediction, Result

LABELS = ("T-shirt/top", "Trouser", "Boot")
DRAWER = ModelInfo(
    name="drawer",
    task="generate",
    labels=LABELS,
    image=(28, 28, 1),
    weights="w1",
    depth=4,
    gears=(
        Gear("full", ExitSchedule((1.0,), (4,)), "ddim", 5, 1.0),
        Gear("eco", ExitSchedule((0.5, 1.0), (4, 2)), "ddim", 5, 1.0),
    ),
    default_gear="full",
)
RULE = DecisionRule("entropy", 0.6, None, "coverage_at_risk", 0.05, 0.95, 0.85, 0.04, 0.05)
JUDGE = ModelInfo(
    name="judge",
    task="classify",
    labels=LABELS,
    image=(28, 28, 1),
    weights="w2",
    methods={"single": 1.0, "bridge": 1.2, "cascade": 1.6},
    calls={"single": 1, "bridge": 2, "cascade": 3},
    decisions={"bridge": RULE, "cascade": RULE},
    sets={"bridge": SetRule("raps", 5000, 1 / 5001)},
    cascade=(CascadePoint(0.0, 1.1864, RULE), CascadePoint(0.1, 1.6, RULE)),
    purifier=PurifierInfo("drawer", "full", 0.3, 1, 13.5, 14, ("single", "bridge")),
    default_method="bridge",
)
INFOS = [DRAWER, JUDGE]
Answer = Callable[[Delivery], Result | None]


def png(picture: Image.Image, encoding: str = "PNG") -> bytes:
    out = BytesIO()
    picture.save(out, encoding, **({"lossless": True} if encoding == "WEBP" else {}))
    return out.getvalue()


def b64(data: bytes) -> str:
    return b64encode(data).decode()


def tile(value: int, encoding: str) -> bytes:
    """A 28 x 28 picture of one grey value, encoded as a worker would."""
    flat = np.full((28, 28, 1), value, np.uint8)
    if encoding == "npy":
        out = BytesIO()
        np.save(out, flat, allow_pickle=False)
        return out.getvalue()
    return png(Image.fromarray(flat[..., 0]), encoding.upper())


def echo(delivery: Delivery) -> Result:
    """Images as grey as their seed; probabilities that rank the classes by index."""
    job = delivery.job
    if isinstance(job, GenerateJob):
        return Result(
            id=job.id, outcome="ok", queue_s=0.25, run_s=0.5, receipt=receipt(job.work),
            images=tuple(
                EncodedImage(tile(seed % 256, job.work.format), label, seed)
                for seed, label in zip(job.work.seeds, job.work.labels, strict=True)
            ),
        )  # fmt: skip
    work = job.work
    calibrated = work.method == "bridge" and work.purify is None
    promised = ("escalate", None if work.alpha is None else (1, 0)) if calibrated else ()
    dose = {} if work.purify is None else {"purified": {"u": 0.3, "steps": 1, "draws": work.purify}}
    prediction = Prediction((0.5, 0.25, 0.25), {"entropy": 1.04}, *promised)
    return Result(
        id=job.id, outcome="ok", receipt={"method": work.method, "cost_vs_single": 1.2, **dose},
        predictions=(prediction,) * work.rows, top_k=work.top_k,
    )  # fmt: skip


def receipt(work: GenerateWork) -> dict[str, Any]:
    cost, depths = 4 * work.steps * work.rows, [4] * work.steps
    return {
        "gear": work.gear,
        "solver": work.solver,
        "steps": work.steps,
        "depth": 4,
        "exit_depths": depths if work.rows == 1 else [depths] * work.rows,
        "layer_evals": cost,
        "layer_evals_full": cost,
        "compute_saved": 0.0,
        "overrides": list(work.overrides),
    }


def failing(code: str) -> Answer:
    return lambda delivery: Result(id=delivery.job.id, outcome="failed", failure=Failure(code, "it broke"))


def expired(delivery: Delivery) -> Result:
    failure = Failure("deadline_exceeded", "the deadline passed while it waited", True)
    return Result(id=delivery.job.id, outcome="expired", failure=failure)


def silent(delivery: Delivery) -> None:
    """Never answers."""


class Worker:
    """Takes jobs from a real broker; `seen` keeps them, `answer` says what comes back."""

    def __init__(self, url: str, answer: Answer, *, notify: bool = True) -> None:
        self.seen: list[GenerateJob | ClassifyJob] = []
        self._broker, self._answer, self._notify = Broker(url), answer, notify
        self._stopping = False

    async def __aenter__(self) -> Worker:
        for info in INFOS:
            await self._broker.ensure(info.name)
        await self._broker.announce("double", INFOS, {})
        self._tasks = [asyncio.create_task(self._serve(info.name)) for info in INFOS]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._broker.aclose()

    async def _serve(self, model: str) -> None:
        while not self._stopping:
            try:
                await self._turn(model)
            except Unavailable:
                await asyncio.sleep(0.05)

    async def _turn(self, model: str) -> None:
        taken = await self._broker.take(model, "double", 64, 64, 60_000)
        for delivery in taken.deliveries:
            self.seen.append(delivery.job)
            if result := self._answer(delivery):
                wake = await self._broker.finish(model, delivery, result, 60)
                if self._notify and wake:
                    await self._broker.notify([wake])
        if not taken.deliveries:
            await self._broker.wait(model, taken.cursors, 50)


class Held:
    """A worker's answer that comes when the test says so."""

    def __init__(self, url: str) -> None:
        self.taken: asyncio.Queue[Delivery] = asyncio.Queue()
        self.broker = Broker(url)

    def __call__(self, delivery: Delivery) -> None:
        self.taken.put_nowait(delivery)

    async def finish(self, delivery: Delivery, result: Result | None = None) -> bool:
        wake = await self.broker.finish(delivery.job.work.model, delivery, result or echo(delivery), 60)
        if wake:
            await self.broker.notify([wake])
        return wake is not None


@contextlib.contextmanager
def gateway(url: str, **settings: Any) -> Iterator[str]:
    """Base URL of a gateway on its own thread and loop."""
    app = create_app(Settings(redis_url=url, **settings))
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    app.state.leaving = lambda: server.should_exit
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextlib.asynccontextmanager
async def client(url: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a fresh gateway."""
    with gateway(url, **settings) as base:
        async with httpx.AsyncClient(base_url=base, timeout=30, trust_env=False) as found:
            yield found
