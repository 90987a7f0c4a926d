"""Starting the contestants, and speaking to them: one class for the peers, one for Offramp as users run it.

All processes of a contestant run on the machine's first cores and the client on the last one: with two cores, a
contestant's front, queue and worker share one, whoever it is. With PEERS_SPREAD=1 they may use the client's core too.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers import accounting, venvs
from benchmarks.peers.work import CLASSES, ENSEMBLE, GENERATOR, SLEEP_MS, Json, Setup
from models.store import ZOO
from service.demo import free_port

CORES = sorted(os.sched_getaffinity(0))
CLIENT, SERVERS = CORES[-1:], CORES if os.environ.get("PEERS_SPREAD") == "1" else CORES[:-1] or CORES
REQUESTS, STEPS, MIXED = 200, 20, (10, 50)
VARIANTS = {
    "generate": ("full", "balanced"),
    "mixed": ("full", "balanced"),
    "classify": ("ensemble", "bridge", "cascade"),
}
PATIENT_S, GRACE_S = 600.0, 4.0
DRILL = {"kind": "drill", "image": [28, 28, 1], "labels": [str(k) for k in range(CLASSES)]}


@dataclass(frozen=True)
class Tuning:
    """How requests are batched for a work: the peers' most requests and longest wait (see `WAITS`), Offramp's slots.

    Slots are the batch where a row has one tick (a step of `sleep` with more rows takes as many times as long), and
    twice that where rows are at several networks. `generate` and `mixed`: two guided pictures saturate a core (card of
    fashion-dit: a call on four network rows takes 2.9 ms a row, one on 32 rows 2.8), and more in a batch only wait for
    each other, whoever batches them.
    """

    batch: int
    wait_ms: float
    slots: int


TUNING = {
    "noop": Tuning(16, 1, 16),
    "sleep": Tuning(16, 5, 16),
    "generate": Tuning(2, 2, 4),
    "mixed": Tuning(2, 2, 4),
    "classify": Tuning(16, 5, 32),
}
# MLServer and Ray Serve end a batch when its time is up, with too few in it where that is shorter than a batch takes,
# 20 ms (peers/tune.py; mosec and LitServe do as well with 5 ms as with 20).
WAITS = {("mlserver", "sleep"): 25.0, ("mlserver", "classify"): 20.0, ("ray", "sleep"): 20.0, ("ray", "classify"): 20.0}


def tiles() -> list[bytes]:
    """The 200 pictures of models/zoo/samples as PNG."""
    sheet, found = np.asarray(Image.open(ZOO / "samples" / "fashion-test.png")), []
    for top in range(0, sheet.shape[0], 28):
        for left in range(0, sheet.shape[1], 28):
            buffer = io.BytesIO()
            Image.fromarray(sheet[top : top + 28, left : left + 28]).save(buffer, "png")
            found.append(buffer.getvalue())
    return found


def requests(work: str) -> list[Json]:
    """What is asked for, in the words of work.py: the same for everybody, in an order drawn once."""
    draw = random.Random(0)
    if work in ("generate", "mixed"):
        steps = [draw.randint(*MIXED) if work == "mixed" else STEPS for _ in range(REQUESTS)]
        return [{"label": i % CLASSES, "seed": i, "steps": n} for i, n in enumerate(steps)]
    pictures = tiles()
    draw.shuffle(pictures)
    return [{"image": base64.b64encode(picture).decode()} for picture in pictures]


def http(path: str, body: Any) -> str:
    """A POST as bytes on the wire."""
    text = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    return f"{head}\r\n\r\n{text}"


class Contestant:
    """Something that serves one work on a port until it is left.

    Attributes:
        name: as in the tables; `version` likewise.
    """

    name = version = ""
    batch = 0

    def __init__(self, work: str, tuning: Tuning) -> None:
        self.work, self.tuning = work, tuning
        self.port, self.mark = free_port(), uuid.uuid4().hex

    def argv(self, setup: Setup) -> list[str]:
        """The command that starts it."""
        raise NotImplementedError

    def ready(self) -> bool:
        """Whether it answers."""
        return self.ask(self.body(requests(self.work)[0], "", 60.0)) is not None

    def body(self, request: Json, variant: str, deadline_s: float) -> tuple[str, Any]:
        """Path and JSON of a request."""
        raise NotImplementedError

    def answer(self, body: Any) -> Json:
        """What work.py would answer, from the body of an answer."""
        raise NotImplementedError

    def worker(self) -> int:
        """The process that runs the model."""
        return int((self.folder / "worker.pid").read_text())

    def start(self, timeout_s: float = PATIENT_S) -> None:
        """Start and wait until it answers; RuntimeError with the end of its log when it does not."""
        self.folder = Path(tempfile.mkdtemp(prefix="peers-"))
        setup = Setup(
            self.work, self.port, self.batch or self.tuning.batch, self.tuning.wait_ms, timeout_s,
            str(self.folder / "worker.pid"),
        )  # fmt: skip
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OFFRAMP_", "PEERS_", "MOSEC_", "RAY_"))}
        environment = inherited | setup.environment() | self.settings(setup) | {accounting.MARK: self.mark}
        environment |= {"PYTHONPATH": str(venvs.REPO), "OMP_NUM_THREADS": "1", "PEERS_FOLDER": str(self.folder)}
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, SERVERS)), *self.argv(setup)],
                env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 60
        while not self.ready():
            if self._process.poll() is not None or time.monotonic() > end:
                told = (self.folder / "log").read_text(errors="replace")[-1500:]
                self.stop()
                raise RuntimeError(f"{self.name} does not start for {self.work}:\n{told}")
            time.sleep(0.2)

    def settings(self, setup: Setup) -> dict[str, str]:
        """Environment of its own."""
        return {}

    def stop(self) -> None:
        """Ask it to end, then end what is left of it; nothing where it has ended."""
        if not self.folder.exists():
            return
        self._process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE_S
        while accounting.members(self.mark) and time.monotonic() < end:
            self._process.poll()
            time.sleep(0.1)
        for pid in accounting.members(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, call: tuple[str, Any], timeout_s: float = 60.0) -> Any:
        """The JSON of a 200; None for anything else."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("POST", call[0], json.dumps(call[1]), {"Content-Type": "application/json"})
            found = connection.getresponse()
            text = found.read()
            return json.loads(text) if found.status == 200 else None
        except (OSError, HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def wire(self, variant: str, deadline_s: float) -> list[str]:
        """All requests of the work as bytes on the wire."""
        return [http(*self.body(request, variant, deadline_s)) for request in requests(self.work)]


class Peer(Contestant):
    """A peer's app in its environment; `path` and the two functions say how its HTTP wraps what work.py knows."""

    def __init__(
        self,
        name: str,
        path: str,
        work: str,
        tuning: Tuning,
        python: Path,
        wrap: Callable[[Json], Any] = lambda request: request,
        unwrap: Callable[[Any], Json] = lambda body: body,
    ) -> None:
        super().__init__(work, tuning)
        self.name, self.path, self.python, self.wrap, self.answer = name, path, python, wrap, unwrap  # type: ignore[method-assign]
        self.version = venvs.version(name)
        self.batch = 1 if name == "fastapi" else 0

    def argv(self, setup: Setup) -> list[str]:
        return [str(self.python), "-m", f"benchmarks.peers.apps.{self.name}_app"]

    def body(self, request: Json, variant: str, deadline_s: float) -> tuple[str, Any]:
        return self.path, self.wrap(request)

    def settings(self, setup: Setup) -> dict[str, str]:
        own = {"BENTOML_HOME": str(self.folder), "BENTOML_DO_NOT_TRACK": "True"}
        if self.name != "ray":
            return own
        chosen = {
            "THROUGHPUT_OPTIMIZED": "1", "ENABLE_HA_PROXY": "1", "HAPROXY_NBTHREAD": str(len(SERVERS)),
            "HAPROXY_CONFIG_FILE_LOC": f"{self.folder}/haproxy.cfg", "HAPROXY_SOCKET_PATH": f"{self.folder}/admin.sock",
            "HAPROXY_SERVER_STATE_BASE": str(self.folder),
            "HAPROXY_SERVER_STATE_FILE": f"{self.folder}/server-state",
            "HAPROXY_METRICS_PORT": str(free_port()), "HAPROXY_STATS_PORT": str(free_port()),
        }  # fmt: skip
        own |= {f"RAY_SERVE_{name}": value for name, value in chosen.items()}
        return own | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


def mlserver_wrap(request: Json) -> Json:
    tensor = {"name": "request", "shape": [1, 1], "datatype": "BYTES", "data": [json.dumps(request)]}
    return {"inputs": [tensor]}


HOW: dict[str, tuple[Any, ...]] = {
    "mosec": ("/inference",),
    "litserve": ("/predict",),
    "bentoml": ("/predict", lambda request: {"requests": [request]}, lambda body: body[0]),
    "ray": ("/",),
    "mlserver": ("/v2/models/peer/infer", mlserver_wrap, lambda body: json.loads(body["outputs"][0]["data"][0])),
    "fastapi": ("/predict",),
}


class Offramp(Contestant):
    """`offramp up`: supervisor, gateway, Valkey, worker; all but slots (`TUNING`) and threads at its default."""

    name = "offramp"

    def argv(self, setup: Setup) -> list[str]:
        return [sys.executable, "-P", "-m", "service.cli", "up"]

    def settings(self, setup: Setup) -> dict[str, str]:
        models = self.folder / "models"
        if self.work in ("noop", "sleep"):
            (models / self.work).mkdir(parents=True)
            slow = {"evaluations": 1, "step_ms": SLEEP_MS, "batch": self.tuning.batch} if self.work == "sleep" else {}
            (models / self.work / "config.json").write_text(json.dumps({**DRILL, "name": self.work, **slow}))
        elif self.work == "classify":
            shutil.copytree(ZOO, models, ignore=shutil.ignore_patterns("samples"))
        else:
            shutil.copytree(ZOO / GENERATOR, models / GENERATOR)
        chosen = {
            "port": self.port, "worker_metrics_port": free_port(), "data_dir": self.folder / "data", "models": models,
            "slots": self.tuning.slots, "threads": 1, "log_level": "warning",
        }  # fmt: skip
        return {f"OFFRAMP_{name.upper()}": str(value) for name, value in chosen.items()}

    def body(self, request: Json, variant: str, deadline_s: float) -> tuple[str, Any]:
        rest = {"deadline_ms": max(1, round(1000 * deadline_s))}
        if self.work in ("generate", "mixed"):
            return "/generate", {"model": GENERATOR, **request, "gear": variant or "full", **rest}
        if self.work == "classify":
            return "/classify", {"model": ENSEMBLE, **request, "method": variant or "ensemble", **rest}
        return "/classify", {"model": self.work, **request, **rest}

    def answer(self, body: Any) -> Json:
        if self.work in ("generate", "mixed"):
            return dict(body["images"][0])
        result = body["results"][0]
        return {**result, "probabilities": list(result["probabilities"].values())}

    def worker(self) -> int:
        """The newest process that runs `offramp worker`."""
        found = []
        for pid in accounting.members(self.mark):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"service.cli" in words and b"worker" in words:
                found.append(pid)
        return max(found)


def variants(name: str, work: str) -> tuple[str, ...]:
    """Ways of asking a contestant for the same work; the first is what the peers do too."""
    return VARIANTS.get(work, ("",)) if name == "offramp" else ("",)


def contestant(name: str, work: str, folder: Path, batch: int = 0, wait_ms: float | None = None) -> Contestant:
    """A contestant by name; `batch` other than 0 and `wait_ms` replace a peer's most requests and longest wait."""
    tuned = TUNING[work]
    own = WAITS.get((name, work), tuned.wait_ms) if wait_ms is None else wait_ms
    tuning = replace(tuned, batch=batch or tuned.batch, wait_ms=own)
    if name == "offramp":
        return Offramp(work, tuning)
    path, *shape = HOW[name]
    python = Path(sys.executable) if name == "fastapi" else venvs.python(folder, name)
    if python is None:
        raise RuntimeError(f"{name} is not installed in {folder}: --install makes it")
    return Peer(name, path, work, tuning, python, *shape)


def names(wanted: Sequence[str]) -> list[str]:
    """Contestants among words, all of them where there is none."""
    known = ["offramp", *HOW]
    return [name for name in known if name in wanted] or known
