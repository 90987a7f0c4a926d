"""`offramp demo`: start everything, sample a grid at two gears, classify shipped images, stop everything."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from typing import Any

from PIL import Image

SAMPLES = Path(__file__).parents[1] / "models" / "zoo" / "samples"
TILE = 28
GEARS = ("full", "balanced")
METHODS = ("single", "bridge", "cascade", "ensemble")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def service(data_dir: Path) -> Iterator[str]:
    """A private `offramp up` on free ports; yields its address, drains it at the end."""
    port, metrics = free_port(), free_port()
    env = {name: value for name, value in environ.items() if not name.startswith("OFFRAMP_")} | {
        "OFFRAMP_PORT": str(port),
        "OFFRAMP_WORKER_METRICS_PORT": str(metrics),
        "OFFRAMP_DATA_DIR": str(data_dir),
    }
    with (data_dir / "up.log").open("wb") as log:
        up = subprocess.Popen([sys.executable, "-P", "-m", "service.cli", "up"], env=env, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, up, data_dir / "up.log")
            yield url
        finally:
            up.terminate()
            up.wait(60)


def wait_ready(url: str, up: subprocess.Popen[bytes], log: Path, timeout_s: float = 60.0) -> None:
    """Return once /readyz says so; fail with the log's end when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and up.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(
        "the service did not become ready; its log ends:\n" + "\n".join(log.read_text().splitlines()[-20:])
    )


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, return JSON."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def tiles(name: str) -> list[list[Image.Image]]:
    """Rows of 28x28 tiles of a shipped sheet."""
    sheet = Image.open(SAMPLES / name)
    return [
        [sheet.crop((x, y, x + TILE, y + TILE)) for x in range(0, sheet.width, TILE)]
        for y in range(0, sheet.height, TILE)
    ]


def encoded(image: Image.Image) -> str:
    """Base64 PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def draw_grid(url: str, gear: str, labels: list[str]) -> tuple[Image.Image, dict[str, float]]:
    """Ten images of every class, one row each, and what they cost."""
    sheet = Image.new("L", (10 * TILE, len(labels) * TILE))
    ran, whole, began = 0, 0, time.perf_counter()
    for row, label in enumerate(labels):
        answer = post(f"{url}/generate", {"label": label, "n": 10, "seed": 100 * row, "gear": gear})
        for column, image in enumerate(answer["images"]):
            tile = Image.open(io.BytesIO(base64.b64decode(image["b64"])))
            sheet.paste(tile, (column * TILE, row * TILE))
        ran += answer["receipt"]["layer_evals"]
        whole += answer["receipt"]["layer_evals_full"]
    seconds = time.perf_counter() - began
    return sheet, {"seconds": seconds, "layer_evals": ran, "saved": 1 - ran / whole}


def side_by_side(sheets: list[Image.Image], scale: int = 2, gap: int = 12) -> Image.Image:
    """Sheets next to each other, enlarged."""
    width, height = sheets[0].size
    picture = Image.new("L", (len(sheets) * width * scale + (len(sheets) - 1) * gap, height * scale), 255)
    for i, sheet in enumerate(sheets):
        picture.paste(sheet.resize((width * scale, height * scale)), (i * (width * scale + gap), 0))
    return picture


def show_generate(url: str, out: Path) -> None:
    """Sample both gears, print the comparison, write the picture."""
    info = json.load(urllib.request.urlopen(f"{url}/models/fashion-dit", timeout=10))
    labels = info["labels"]
    draw_grid(url, GEARS[0], labels[:1])
    sheets = []
    print(f"\n{'gear':<10}{'100 images in':>14}{'layer evaluations':>20}{'compute saved':>16}")
    for gear in GEARS:
        sheet, cost = draw_grid(url, gear, labels)
        sheets.append(sheet)
        print(f"{gear:<10}{cost['seconds']:>12.1f} s{cost['layer_evals']:>20,}{cost['saved']:>16.1%}")
    side_by_side(sheets).save(out)
    print(f"\npicture ({' left, '.join(GEARS)} right; one row per class): {out}")


def show_classify(url: str) -> None:
    """Classify 20 test images and 10 digits by every method, print a table."""
    fashion = [(k, row[j]) for k, row in enumerate(tiles("fashion-test.png")) for j in range(2)]
    digits = tiles("digits-ood.png")[0]
    images = [encoded(tile) for _, tile in fashion] + [encoded(tile) for tile in digits]
    print(f"\n{'method':<10}{'correct of 20':>14}{'entropy, clothes':>18}{'entropy, digits':>17}{'cost vs single':>16}")
    for method in METHODS:
        answer = post(f"{url}/classify", {"images": images, "method": method})
        results = answer["results"]
        right = sum(found["index"] == k for (k, _), found in zip(fashion, results, strict=False))
        entropy = [found["uncertainty"]["entropy"] for found in results]
        known, unknown = sum(entropy[:20]) / 20, sum(entropy[20:]) / len(digits)
        cost = answer["receipt"]["cost_vs_single"]
        print(f"{method:<10}{right:>14}{known:>18.3f}{unknown:>17.3f}{cost:>15.2f}x")
    print("\nThe models know clothes, not digits: entropy (nats) says so.")


def run(out: Path) -> None:
    """The whole demo; nothing is left running."""
    began = time.perf_counter()
    print("starting: embedded Valkey, gateway, worker ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="offramp-demo-") as folder, service(Path(folder)) as url:
        print(f"ready at {url} after {time.perf_counter() - began:.1f} s", flush=True)
        show_generate(url, out)
        show_classify(url)
    print(f"done in {time.perf_counter() - began:.1f} s; nothing is left running")
