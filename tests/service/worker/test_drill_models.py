"""A drill folder is loaded by the worker and runs in its engine, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from models.tasks.drill import answer
from service.config import Settings
from service.metrics import WorkerMetrics
from service.worker.engine import Engine
from service.worker.main import load_tasks
from tests.service.worker.work import delivery, judge
from tests.support import REPO


def models(root: Path) -> Path:
    (root / "canary").mkdir()
    (root / "canary" / "config.json").write_text(json.dumps({"kind": "drill", "name": "canary", "evaluations": 3}))
    return root


def test_an_engine_answers_exactly(tmp_path: Path) -> None:
    [task] = load_tasks(Settings(models=models(tmp_path), slots=4))
    engine, job = Engine(task, WorkerMetrics()), judge((b"\1", b"\2"), model="canary")
    engine.offer(delivery(job))
    over = [done for _ in range(4) for done in engine.tick()]
    [done] = over
    assert done.outcome == "ok"
    assert [row.probabilities for row in done.rows] == [answer(image, 3, 2) for image in (b"\1", b"\2")]


def test_no_torch_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from pathlib import Path\nfrom service.config import Settings\nfrom service.worker.main import load_tasks\n"
        f"assert load_tasks(Settings(models=Path({str(models(tmp_path))!r})))[0].info.name == 'canary'\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
