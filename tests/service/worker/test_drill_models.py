"""A drill folder is served by a worker that has no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import REPO


def test_the_worker_loads_a_drill_without_torch(tmp_path: Path) -> None:
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "config.json").write_text(json.dumps({"kind": "drill", "name": "canary", "evaluations": 3}))
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from pathlib import Path\nfrom service.config import Settings\nfrom service.worker.main import load_tasks\n"
        f"[task] = load_tasks(Settings(models=Path({str(tmp_path)!r}), slots=3))\n"
        "assert (task.info.name, task.info.task, task.capacity) == ('canary', 'classify', 3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
