"""`offramp up`: the store, a gateway and a worker as child processes; a dead one is restarted, Ctrl-C drains."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Protocol

from service.broker.embedded import Embedded, die_with_parent
from service.config import ConfigError, Settings
from service.errors import OfframpError
from service.keys import gateway_keyring

LOOK_S = 0.1
HEALTHY_S = 10.0
GRACE_S = 45.0
BACKOFF_S = (0.5, 30.0)


class Part(Protocol):
    """Something that runs beside us: the store or a child process."""

    @property
    def pid(self) -> int | None:
        """Its process id, once started."""

    def start(self) -> None:
        """Start, or start again after a death; OfframpError when it cannot."""

    def alive(self) -> bool:
        """Whether its process runs."""


class Program:
    """An `offramp` command in its own session: Ctrl-C reaches it through us, and it dies with us."""

    def __init__(self, command: str, environment: Mapping[str, str]) -> None:
        self._argv = [sys.executable, "-P", "-m", "service.cli", command]
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the last start."""
        return self._process.pid if self._process else None

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start the command."""
        self._process = subprocess.Popen(
            self._argv,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal to a living process."""
        if self._process is not None and self.alive():
            self._process.send_signal(number)


class Watch:
    """Restarts a part: at once after a healthy life, else after a pause that doubles up to 30 s."""

    def __init__(self, name: str, part: Part, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self.name, self.part = name, part
        self._say, self._clock = say, clock
        self._started = clock()
        self._short_lives = 0
        self._due: float | None = None

    def tend(self) -> None:
        """Look once: notice a death, start again when it is time."""
        now = self._clock()
        if self._due is None:
            if self.part.alive():
                return
            self._short_lives = 0 if now - self._started >= HEALTHY_S else self._short_lives + 1
            self._plan(now, "died")
        if self._due is not None and now >= self._due:
            self._restart(now)

    def _plan(self, now: float, what: str) -> None:
        pause = restart_pause(self._short_lives)
        self._due = now + pause
        self._say(f"{self.name:<8} {what}; restarting" + (f" in {pause:g} s" if pause else ""))

    def _restart(self, now: float) -> None:
        try:
            self.part.start()
        except OfframpError as error:
            self._short_lives += 1
            self._plan(now, f"does not start: {error.detail}")
            return
        self._started, self._due = self._clock(), None
        self._say(f"{self.name:<8} pid {self.part.pid}")


def restart_pause(short_lives: int) -> float:
    """Seconds before a restart after so many short lives in a row."""
    return 0.0 if short_lives == 0 else min(BACKOFF_S[1], BACKOFF_S[0] * 2.0 ** (short_lives - 1))


class Supervisor:
    """Owns the processes of one `offramp up`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stops = 0
        self._store = None if settings.redis_url else Embedded(settings.data_dir)
        self._redis_url = self._store.url if self._store else settings.redis_url
        environment = {**os.environ, "OFFRAMP_REDIS_URL": self._redis_url}
        self._gateway, self._worker = Program("gateway", environment), Program("worker", environment)

    def run(self) -> int:
        """Start everything, keep it alive until SIGINT or SIGTERM, drain; 0 when nothing had to be killed."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        gateway_keyring(self._settings)
        check_port("OFFRAMP_PORT", self._settings.host, self._settings.port)
        check_port("OFFRAMP_WORKER_METRICS_PORT", self._settings.worker_host, self._settings.worker_metrics_port)
        try:
            self._watch(self._start())
            return self._drain()
        finally:
            for program in (self._gateway, self._worker):
                program.send(signal.SIGKILL)
            if self._store:
                self._store.stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _start(self) -> list[Watch]:
        settings = self._settings
        metrics = base_url(settings.worker_host, settings.worker_metrics_port)
        parts: list[tuple[str, Part, str]] = [
            ("gateway", self._gateway, base_url(settings.host, settings.port)),
            ("worker", self._worker, f"{metrics}/metrics"),
        ]
        if self._store:
            parts.insert(0, ("store", self._store, f"{self._redis_url}  data in {settings.data_dir}"))
        watches = []
        for name, part, where in parts:
            part.start()
            say(f"{name:<8} pid {part.pid}  {where}")
            watches.append(Watch(name, part, say, time.monotonic))
        return watches

    def _watch(self, watches: list[Watch]) -> None:
        settings, began, ready = self._settings, time.monotonic(), False
        while not self._stops:
            for watch in watches:
                watch.tend()
            if not ready and is_ready(settings.host, settings.port):
                ready = True
                url = base_url(settings.host, settings.port)
                say(f"ready    {url}/docs after {time.monotonic() - began:.1f} s; Ctrl-C drains")
            time.sleep(LOOK_S)

    def _drain(self) -> int:
        """The gateway first, while the worker still answers what it waits for; then the worker; then the store."""
        say("draining; Ctrl-C again stops at once")
        clean = True
        for name, program in (("gateway", self._gateway), ("worker", self._worker)):
            program.send(signal.SIGTERM)
            give_up = time.monotonic() + GRACE_S
            while program.alive() and time.monotonic() < give_up and self._stops < 2:
                time.sleep(LOOK_S)
            if program.alive():
                clean = False
                say(f"{name:<8} killed; its jobs are left to redelivery")
                program.send(signal.SIGKILL)
        say("drained" if clean else "stopped")
        return 0 if clean else 1


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, flush=True)


def located(settings: Settings) -> Settings:
    """The settings with the embedded server's address where no other is named."""
    if settings.redis_url:
        return settings
    return settings.model_copy(update={"redis_url": Embedded(settings.data_dir).url})


def reachable_host(host: str) -> str:
    """Where a local client finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def base_url(host: str, port: int) -> str:
    """http://host:port of a local server."""
    host = reachable_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_ready(host: str, port: int) -> bool:
    """Whether /readyz says 200."""
    connection = http.client.HTTPConnection(reachable_host(host), port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def check_port(variable: str, host: str, port: int) -> None:
    """Refuse to start on a port that is taken, naming the setting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{variable}={port} on {host}: {error.strerror}; choose another") from None
