"""A store, gateways and workers as real processes that tests may kill, stop, cut off and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from redis import Redis

import models
from service.broker.embedded import Embedded
from tests.chaos.clients import Told
from tests.chaos.network import Proxy
from tests.support import REPO, free_port, get_json, wait_for

DRILL = {
    "kind": "drill",
    "name": "drill",
    "image": [4, 4, 1],
    "labels": ["a", "b", "c"],
    "evaluations": 5,
    "step_ms": 10,
}
POISON = {**DRILL, "name": "poison", "evaluations": 3, "faults": True, "most_rows": 2, "hang_s": 5}
LEASE_S = 1.0


class Store(Embedded):
    """The embedded server, or another `executable`, on a TCP port, with an append-only file as asked."""

    def __init__(self, folder: Path, fsync: str, executable: Path | None) -> None:
        super().__init__(folder, executable)
        self.port, self.fsync = free_port(), fsync

    def _options(self) -> list[str]:
        return [*super()._options(), "--port", str(self.port), "--appendfsync", self.fsync]

    def kill(self) -> None:
        assert self.pid
        os.kill(self.pid, signal.SIGKILL)
        assert self._process
        self._process.wait()


class Member:
    """A gateway or a worker: an `offramp` command that outlives nothing."""

    def __init__(self, kind: str, name: str, folder: Path, settings: dict[str, str], extra: dict[str, str]) -> None:
        self.kind, self.name, self.log = kind, name, folder / f"{name}.log"
        self.port = free_port()
        mine = {"PORT": str(self.port)} if kind == "gateway" else {"WORKER_METRICS_PORT": str(self.port)}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("OFFRAMP_")}
        self._environment = inherited | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | extra
        self._environment |= {f"OFFRAMP_{key}": value for key, value in (settings | mine).items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.lives = 0

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with self.log.open("ab") as sink:
            argv = [sys.executable, "-P", "-m", "service.cli", self.kind]
            self._process = subprocess.Popen(argv, env=self._environment, cwd=self.log.parent, stdout=sink, stderr=sink)
        self.lives += 1

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self._process
        self._process.wait()


class Fleet:
    """One store, `gateways` gateways and a worker for each list of model folders in `workers`.

    Args:
        workers: for each worker the configs of drills (dicts) and shipped models (names) that it serves.
        proxied: worker number -> whether it reaches the store through a Proxy.
        extra: worker number -> more environment.
        settings: OFFRAMP_ settings by name without the prefix.

    Tests that share a fleet keep what its clients were told in `told`: an audit needs all of it.
    """

    def __init__(
        self,
        folder: Path,
        workers: Sequence[Sequence[dict[str, Any] | str]],
        gateways: int = 1,
        fsync: str = "always",
        proxied: Sequence[int] = (),
        extra: dict[int, dict[str, str]] | None = None,
        executable: Path | None = None,
        **settings: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.told: list[Told] = []
        self.folder, self.store = folder, Store(folder / "data", fsync, executable)
        base = {"LEASE_S": str(LEASE_S), "MAX_DELIVERIES": "3", "DEADLINE_S": "120", "RESULT_TTL_S": "3600"}
        chosen = (
            base | {"REDIS_URL": self.url(self.store.port)} | {key.upper(): value for key, value in settings.items()}
        )
        self.proxies = {number: Proxy(free_port(), self.store.port) for number in proxied}
        self.gateways = [Member("gateway", f"gateway-{i}", folder, chosen, {}) for i in range(gateways)]
        self.workers = []
        for i, served in enumerate(workers):
            mine = {"MODELS": str(self._models(i, served))}
            if i in self.proxies:
                mine["REDIS_URL"] = self.url(self.proxies[i].port)
            self.workers.append(Member("worker", f"worker-{i}", folder, chosen | mine, (extra or {}).get(i, {})))

    @staticmethod
    def url(port: int) -> str:
        return f"redis://127.0.0.1:{port}/0"

    def _models(self, number: int, served: Sequence[dict[str, Any] | str]) -> Path:
        root = self.folder / f"models-{number}"
        root.mkdir()
        zoo = Path(models.__file__).parent / "zoo"
        for model in served:
            if isinstance(model, str):
                (root / model).symlink_to(zoo / model)
            else:
                (root / model["name"]).mkdir()
                (root / model["name"] / "config.json").write_text(json.dumps(model))
        return root

    @property
    def ports(self) -> list[int]:
        return [gateway.port for gateway in self.gateways]

    def redis(self) -> Redis:
        return Redis.from_url(self.url(self.store.port), decode_responses=False)

    def members(self) -> list[Member]:
        return [*self.gateways, *self.workers]

    def __enter__(self) -> Fleet:
        self.store.start()
        for proxy in self.proxies.values():
            proxy.start()
        for member in self.members():
            member.start()
        try:
            self.ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members():
            if member.alive():
                member.send(signal.SIGCONT)
                member.kill()
        for proxy in self.proxies.values():
            proxy.stop()
        self.store.stop()

    def ready(self, seconds: float = 60.0) -> None:
        """Every process answers, and every worker gave a sign of life."""

        def all_there() -> bool:
            said = [get_json(f"http://127.0.0.1:{port}/readyz") for port in self.ports]
            counts = [one["models"] for one in said if one]
            return len(counts) == len(said) and all(max(found.values(), default=0) >= 1 for found in counts)

        wait_for("the fleet", all_there, seconds)
        wait_for("every worker", lambda: all(self._serving(worker) for worker in self.workers), seconds)

    def _serving(self, worker: Member) -> bool:
        assert worker.alive(), f"{worker.name} ended:\n{worker.log.read_text()[-3000:]}"
        return f"-{worker.pid}-".encode() in b" ".join(
            member
            for key in self.redis().scan_iter("offramp:{m:*}:workers")
            for member in self.redis().zrange(key, 0, -1)
        )

    def tend(self) -> None:
        """Start again what died, as a supervisor would."""
        if not self.store.alive():
            self.store.start()
        for member in self.members():
            if not member.alive():
                member.start()

    def logs(self, worker: int) -> str:
        return self.workers[worker].log.read_text()


def stopped(member: Member, seconds: float) -> None:
    """SIGSTOP a process for a while."""
    member.send(signal.SIGSTOP)
    time.sleep(seconds)
    member.send(signal.SIGCONT)
