"""What the queue costs: CPU and latency of gateway, store and worker around a model that does nothing; overload.

    python benchmarks/bench_queue.py [--seconds S] [--repeats N] [--connections 1 16 64 256] [--overload-seconds S]

Gateway, embedded store and worker are processes of their own; so is the client, whose CPU is told apart. One picture a
request, another for each of 64.

cost       closed loop: CPU-ms per request of each process (utime + stime, idle polling included) and latency, beside
           plain FastAPI (the same body in, the same bytes out) in turn.
overload   a drill of 4 evaluations of 10 ms in 4 slots. Its capacity by a closed loop, then Poisson arrivals at twice
           that with a deadline: what became of accepted work (by the ledger), how fast the rest was refused, memory.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from redis import Redis

from benchmarks.common import finish, table
from service.broker import keys
from service.broker.embedded import Embedded
from service.demo import free_port

REPO = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
NOTHING = {"kind": "drill", "name": "nothing", "image": [28, 28, 1], "labels": [str(k) for k in range(10)]}
SLOW = {**NOTHING, "name": "slow", "evaluations": 4, "step_ms": 10}
PICTURES, WARMUP_S, DEADLINE_MS = 64, 1.0, 1000


class Service:
    """A running store, gateway and worker that serve `drills`, or the folder of setting `models`; one process each."""

    def __init__(self, folder: Path, drills: Sequence[dict[str, Any]], **settings: str) -> None:
        self._folder, self.port, self._stack = folder, free_port(), ExitStack()
        for config in drills:
            (folder / "models" / config["name"]).mkdir(parents=True)
            (folder / "models" / config["name"] / "config.json").write_text(json.dumps(config))
        self.store = Embedded(folder / "data")
        chosen = {
            "redis_url": self.store.url,
            "models": str(folder / "models"),
            "port": str(self.port),
            "worker_metrics_port": str(free_port()),
            "log_level": "warning",
            **settings,
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("OFFRAMP_")}
        self._environment = inherited | {f"OFFRAMP_{key.upper()}": value for key, value in chosen.items()}
        self._environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Service:
        self.store.start()
        self._stack.callback(self.store.stop)
        self.redis = self._stack.enter_context(Redis.from_url(self.store.url))
        self.pids["store"] = self.store.pid or 0
        for name in ("gateway", "worker"):
            argv = [sys.executable, "-P", "-m", "service.cli", name]
            self.pids[name] = self._stack.enter_context(process(argv, self._environment, self._folder / f"{name}.log"))
        until_ok(self.port, "/readyz")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ledger(self, model: str) -> dict[str, int]:
        """Counts of accepted jobs and of their outcomes."""
        found: Any = self.redis.hgetall(keys.ledger(model))
        return {name.decode(): int(count) for name, count in found.items()}


@contextmanager
def process(argv: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[int]:
    """A child process, told to end at the end; its pid."""
    with log.open("ab") as sink:
        child = subprocess.Popen(argv, env=environment, cwd=log.parent, stdout=sink, stderr=sink)
    try:
        yield child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def until_ok(port: int, path: str, seconds: float = 60.0) -> None:
    """Wait until `path` answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        connection = HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise SystemExit(f"nothing answers 200 at {path} on port {port} within {seconds:g} s")


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process and its threads have used (Linux; in ticks of 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_mib(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def picture(number: int) -> str:
    """Base64 of a 28 x 28 grey PNG, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (28, 28), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def requests(model: str, deadline_ms: int) -> list[str]:
    """One POST /classify for each of the pictures."""
    found = []
    for number in range(PICTURES):
        body = json.dumps({"model": model, "image": picture(number), "deadline_ms": deadline_ms})
        head = (
            f"POST /classify HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        found.append(f"{head}\r\n\r\n{body}")
    return found


def load(port: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Run the client, a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.http_client"]
    ran = subprocess.run(
        argv, input=json.dumps({"port": port, **plan}), stdout=subprocess.PIPE, text=True, cwd=REPO, check=True
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def measured(port: int, pids: dict[str, int], plan: dict[str, Any]) -> dict[str, Any]:
    """One closed-loop run: latency in ms, requests per second, CPU-ms per request by process."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    seen = load(port, plan)
    used = {name: 1000 * (cpu_s(pid) - before[name]) / seen["requests"] for name, pid in pids.items()}
    if strange := Counter(status for *_, status in seen["seen"] if status != 200):
        raise SystemExit(f"not every answer was 200: {dict(strange)}\n{seen['bodies']}")
    latency = [1000 * took for _, took, _ in seen["seen"]]
    return {
        "p50_ms": quantile(latency, 0.5),
        "p99_ms": quantile(latency, 0.99),
        "requests_per_s": seen["requests"] / seen["elapsed_s"],
        "cpu_ms": used | {"sum": sum(used.values())},
        "client_cpu_ms": 1000 * seen["cpu_s"] / seen["requests"],
    }


def cost(folder: Path, connections: Sequence[int], seconds: float, repeats: int) -> dict[str, Any]:
    """Offramp and plain FastAPI in turn, by connections; medians over the repeats."""
    found: dict[str, Any] = {}
    with Service(folder, [NOTHING]) as service, ExitStack() as stack:
        sent = requests("nothing", 60_000)
        once = load(service.port, {"requests": sent, "connections": 1, "seconds": 0.5})
        (folder / "answer.json").write_text(once["bodies"]["200"])
        port, environment = free_port(), {**os.environ, "PYTHONPATH": str(REPO)}
        argv = [sys.executable, "-m", "benchmarks.plain_app", str(port), str(folder / "answer.json")]
        plain = {"plain": stack.enter_context(process(argv, environment, folder / "plain.log"))}
        until_ok(port, "/docs")
        for number in connections:
            plan = {"requests": sent, "connections": number, "seconds": seconds, "warmup_s": WARMUP_S}
            turns = [(measured(service.port, service.pids, plan), measured(port, plain, plan)) for _ in range(repeats)]
            found[str(number)] = {"offramp": middle([t[0] for t in turns]), "plain": middle([t[1] for t in turns])}
    return found


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number over runs of the same shape."""
    first = runs[0]
    return {
        key: middle([run[key] for run in runs])
        if isinstance(first[key], dict)
        else statistics.median(r[key] for r in runs)
        for key in first
    }


def overload(folder: Path, seconds: float) -> dict[str, Any]:
    """Twice what the model can do, open loop, with a deadline."""
    with Service(folder, [SLOW], slots="4") as service:
        plan = {"requests": requests("slow", 60_000), "connections": 16, "seconds": 5.0, "warmup_s": 2.0}
        capacity = measured(service.port, service.pids, plan)["requests_per_s"]
        plan = {"requests": requests("slow", DEADLINE_MS), "rate": 2 * capacity, "seconds": seconds}
        load(service.port, plan | {"seconds": 3.0, "seed": 1})
        resident, before = {name: resident_mib(pid) for name, pid in service.pids.items()}, service.ledger("slow")
        cpu = {name: cpu_s(pid) for name, pid in service.pids.items()}
        seen = load(service.port, plan)
        after = service.ledger("slow")
        cpu = {name: 1000 * (cpu_s(pid) - cpu[name]) / seen["requests"] for name, pid in service.pids.items()}
        grown = {name: [resident[name], resident_mib(pid)] for name, pid in service.pids.items()}
    ledger = {name: after[name] - before.get(name, 0) for name in after}
    late = [took for _, took, status in seen["seen"] if status == 200 and 1000 * took > DEADLINE_MS]
    refused = sorted(took for _, took, status in seen["seen"] if status in (429, 503, 504))
    refused = refused[: seen["requests"] - ledger["accepted"]]
    return {
        "capacity_per_s": capacity,
        "offered_per_s": seen["requests"] / seconds,
        "statuses": dict(Counter(str(status) for *_, status in seen["seen"])),
        "ledger": ledger,
        "accepted_in_time": (ledger.get("ok", 0) - len(late)) / ledger["accepted"],
        "ok_per_s": ledger.get("ok", 0) / seconds,
        "ok_p50_ms": 1000 * quantile([took for _, took, status in seen["seen"] if status == 200], 0.5),
        "refused": len(refused),
        "refusal_p50_ms": 1000 * quantile(refused, 0.5),
        "refusal_p99_ms": 1000 * quantile(refused, 0.99),
        "resident_mib": grown,
        "cpu_ms": cpu | {"sum": sum(cpu.values())},
        "client_cpu_ms": 1000 * seen["cpu_s"] / seen["requests"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each closed-loop run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--overload-seconds", type=float, default=30.0, help="0: leave it out")
    chosen = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if chosen.connections:
            found["cost"] = cost(Path(folder) / "cost", chosen.connections, chosen.seconds, chosen.repeats)
            show_cost(found["cost"])
        if chosen.overload_seconds:
            found["overload"] = overload(Path(folder) / "overload", chosen.overload_seconds)
            show_overload(found["overload"])
    finish("queue", **found)


def show_cost(found: dict[str, Any]) -> None:
    rows = []
    for number, sides in found.items():
        for side, run in sides.items():
            cpu = run["cpu_ms"]
            parts = [f"{cpu[name]:.2f}" if name in cpu else "" for name in ("gateway", "store", "worker", "sum")]
            speed = [f"{run[key]:.1f}" for key in ("p50_ms", "p99_ms", "requests_per_s")]
            rows.append([number, side, *parts, *speed, f"{run['client_cpu_ms']:.2f}"])
    print("CPU-ms per request by process, latency, beside plain FastAPI in the same run\n")
    table(
        ("connections", "app", "gateway", "store", "worker", "sum", "p50 ms", "p99 ms", "requests / s", "client"), rows
    )


def show_overload(found: dict[str, Any]) -> None:
    print(f"Twice the capacity of {found['capacity_per_s']:.0f} requests / s, deadline {DEADLINE_MS} ms\n")
    rows = [[name, value] for name, value in found.items() if not isinstance(value, dict)]
    table(("what", "value"), [[name, f"{value:.4g}"] for name, value in rows])
    print(f"answers {found['statuses']}, ledger {found['ledger']}")
    for name, (start, end) in found["resident_mib"].items():
        print(f"{name}: {start:.1f} MiB resident at the start, {end:.1f} at the end")
    print()


if __name__ == "__main__":
    main()
