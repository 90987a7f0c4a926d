"""What can go wrong, as functions of a Fleet; each heals itself before it returns."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from tests.chaos.fleet import LEASE_S, Fleet, stopped

Fault = Callable[[Fleet, random.Random], None]


def kill_worker(fleet: Fleet, draw: random.Random) -> None:
    draw.choice(fleet.workers).kill()


def kill_workers(fleet: Fleet, draw: random.Random) -> None:
    for worker in fleet.workers:
        worker.kill()


def kill_gateway(fleet: Fleet, draw: random.Random) -> None:
    draw.choice(fleet.gateways).kill()


def kill_store(fleet: Fleet, draw: random.Random) -> None:
    fleet.store.kill()


def drain_worker(fleet: Fleet, draw: random.Random) -> None:
    draw.choice(fleet.workers).send(signal.SIGTERM)


def stop_worker(fleet: Fleet, draw: random.Random) -> None:
    """It is gone for longer than its leases, and comes back believing that it has them."""
    stopped(draw.choice(fleet.workers), draw.uniform(2, 4) * LEASE_S)


def stop_gateway(fleet: Fleet, draw: random.Random) -> None:
    stopped(draw.choice(fleet.gateways), draw.uniform(1, 4))


def cut_network(fleet: Fleet, draw: random.Random) -> None:
    proxy = draw.choice(list(fleet.proxies.values()))
    proxy.cut()
    time.sleep(draw.uniform(1, 3) * LEASE_S)
    proxy.heal()


def swallow_network(fleet: Fleet, draw: random.Random) -> None:
    proxy = draw.choice(list(fleet.proxies.values()))
    proxy.swallow()
    time.sleep(draw.uniform(2, 4) * LEASE_S)
    proxy.heal()


def slow_network(fleet: Fleet, draw: random.Random) -> None:
    proxy = draw.choice(list(fleet.proxies.values()))
    proxy.delay_s = draw.uniform(0.1, 0.4)
    time.sleep(4)
    proxy.heal()


def fill_store(fleet: Fleet, draw: random.Random) -> None:
    """No memory for anything new."""
    with fleet.redis() as redis:
        try:
            redis.config_set("maxmemory", 1)
            time.sleep(draw.uniform(1, 3))
        except RedisError:
            return
        finally:
            free_store(redis)


def free_store(redis: Redis) -> None:
    """Undo `fill_store`; a store that was restarted has forgotten it by itself."""
    for _ in range(100):
        try:
            redis.config_set("maxmemory", 0)
            return
        except RedisError:
            time.sleep(0.1)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_worker, kill_workers, kill_gateway, kill_store, drain_worker, stop_worker, stop_gateway, cut_network,
        swallow_network, slow_network, fill_store,
    )
}  # fmt: skip


class PowerCut:
    """Kills the store and takes from its append-only file what came in the last `lost_s` seconds, as a machine that
    goes down does under `appendfsync everysec`: a SIGKILL alone loses nothing that was written to the kernel."""

    def __init__(self, folder: Path, lost_s: float = 1.0) -> None:
        self._folder, self._lost_s = folder, lost_s
        self._sizes: deque[tuple[float, Path, int]] = deque(maxlen=200)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.lost_bytes = 0

    def __enter__(self) -> PowerCut:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _now(self) -> tuple[float, Path, int]:
        path = max((self._folder / "appendonlydir").glob("*.incr.aof"), key=lambda p: int(p.name.split(".")[-3]))
        return time.monotonic(), path, path.stat().st_size

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._sizes.append(self._now())

    def __call__(self, fleet: Fleet) -> None:
        fleet.store.kill()
        killed, path, size = self._now()
        kept = [length for at, p, length in self._sizes if p == path and at <= killed - self._lost_s]
        if kept:
            with path.open("r+b") as file:
                file.truncate(kept[-1])
            self.lost_bytes += size - kept[-1]
        self._sizes.clear()
