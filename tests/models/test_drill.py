"""Drill models: exact answers without torch, restored anywhere, trouble on demand only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.api import ClassifyWork, Task, UserError
from models.registry import TASKS, resolve
from models.store import StoreError
from models.tasks.drill import DrillTask, Fault, answer, load
from tests.support import REPO

IMAGES = (b"ab", b"cd", b"ef", b"gh")


def folder(root: Path, **config: Any) -> Path:
    root.mkdir(exist_ok=True)
    made = {"kind": "drill", "name": "drill", "image": [1, 2, 1], "labels": ["a", "b", "c"], **config}
    (root / "config.json").write_text(json.dumps(made))
    return root


def drill(root: Path, slots: int = 8, **config: Any) -> DrillTask:
    return load(folder(root, **config), slots, "cpu")


def work(*images: bytes) -> ClassifyWork:
    return ClassifyWork(model="drill", images=images, method="single", top_k=1)


def test_answers_are_exact_functions_of_images_and_evaluations(tmp_path: Path) -> None:
    task = drill(tmp_path, evaluations=3)
    assert task.admit(work(*IMAGES), [0, 1, 2], [5, 0, 2]) == [3, 3, 3]
    for _ in range(3):
        assert task.step([0, 2, 5]).rows == 3
    rows = task.collect([5, 0, 2])
    assert [row.probabilities for row in rows] == [answer(image, 3, 3) for image in IMAGES[:3]]
    every = {answer(image, evaluations, 3) for image in IMAGES for evaluations in range(5)}
    assert len(every) == 20
    assert all(sum(p) == pytest.approx(1.0) for p in every)


def test_it_is_a_task_of_the_registry_that_answers_at_once_by_default(tmp_path: Path) -> None:
    task = resolve(TASKS, "drill")(folder(tmp_path), 2, "cpu")
    assert isinstance(task, Task)
    assert task.admit(work(b"xy"), [0], [1]) == [0]
    [row] = task.collect([1])
    assert row.probabilities == answer(b"xy", 0, 3)
    assert task.receipt(work(b"xy"), [row]) == {"method": "single", "cost_vs_single": 1.0}
    assert task.preview([1]) == [None]


@pytest.mark.parametrize("broken", range(4))
def test_a_row_goes_on_in_another_worker(tmp_path: Path, broken: int) -> None:
    first, second = drill(tmp_path, evaluations=3), drill(tmp_path, evaluations=3)
    first.admit(work(*IMAGES), [0, 1], [0, 1])
    for _ in range(broken):
        first.step([0, 1])
    assert second.restore(work(*IMAGES), [1, 0], [6, 7], first.save([1, 0])) == [3 - broken] * 2
    for _ in range(3 - broken):
        second.step([6, 7])
    assert [row.probabilities for row in second.collect([7, 6])] == [answer(image, 3, 3) for image in IMAGES[:2]]


@pytest.mark.parametrize("state", [b"\x00\x00\x00\x01", b"\x00\x00\x00\x09" + bytes(16), bytes(21)])
def test_a_damaged_state_is_refused(tmp_path: Path, state: bytes) -> None:
    with pytest.raises(ValueError, match="no state of a row"):
        drill(tmp_path, evaluations=3).restore(work(b"xy"), [0], [0], [state])


@pytest.mark.parametrize(("fault", "error"), [(Fault.RAISE, RuntimeError), (Fault.MEMORY, MemoryError)])
def test_faults_leave_rows_where_they_were_and_spare_other_batches(tmp_path: Path, fault: Fault, error: Any) -> None:
    task = drill(tmp_path, evaluations=1, faults=True)
    task.admit(work(b"ab", bytes([fault, 0])), [0, 1], [0, 1])
    before = task.save([0, 1])
    with pytest.raises(error):
        task.step([0, 1])
    assert task.save([0, 1]) == before
    task.step([0])
    assert task.collect([0])[0].probabilities == answer(b"ab", 1, 3)
    if fault is Fault.MEMORY:
        task.step([1])
        assert task.collect([1])[0].probabilities == answer(bytes([fault, 0]), 1, 3)


@pytest.mark.parametrize(("fault", "status"), [(Fault.EXIT, 1), (Fault.KILL, -9)])
def test_faults_that_end_the_process(tmp_path: Path, fault: Fault, status: int) -> None:
    folder(tmp_path, evaluations=1, faults=True)
    code = (
        "from pathlib import Path\nfrom models.api import ClassifyWork\nfrom models.tasks.drill import load\n"
        f"task = load(Path({str(tmp_path)!r}), 1, 'cpu')\n"
        f"task.admit(ClassifyWork(model='d', images=({bytes([fault, 0])!r},), method='single', top_k=1), [0], [0])\n"
        "task.step([0])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == status


def test_a_hang_ends_after_its_time(tmp_path: Path) -> None:
    task = drill(tmp_path, evaluations=1, faults=True, hang_s=0.01)
    task.admit(work(bytes([Fault.HANG, 0])), [0], [0])
    task.step([0])
    assert task.collect([0])[0].probabilities == answer(bytes([Fault.HANG, 0]), 1, 3)


@pytest.mark.parametrize(("rows", "batch", "slept"), [(4, 0, 0.02), (4, 4, 0.02), (5, 4, 0.04), (1, 4, 0.02)])
def test_a_step_of_too_many_rows_takes_as_many_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, slept: float
) -> None:
    sleeps: list[float] = []
    monkeypatch.setattr("models.tasks.drill.time.sleep", sleeps.append)
    task = drill(tmp_path, evaluations=1, step_ms=20, batch=batch)
    task.admit(work(*[b"ab"] * rows), range(rows), range(rows))
    task.step(range(rows))
    assert sleeps == [slept]


def test_no_image_makes_trouble_unless_the_folder_says_so(tmp_path: Path) -> None:
    task = drill(tmp_path, evaluations=1)
    images = [bytes([fault, 0]) for fault in Fault]
    task.admit(work(*images), range(5), range(5))
    task.step(range(5))
    assert [row.probabilities for row in task.collect(range(5))] == [answer(image, 1, 3) for image in images]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"evaluation": 3}, "a drill has no evaluation; it has"),
        ({"task": "generate"}, "task must be classify"),
        ({"labels": ["a"]}, "labels must be two or more"),
        ({"image": [1, 1]}, "image must be height, width and channels"),
        ({"evaluations": -1}, "must not be negative"),
        ({"batch": -1}, "must not be negative"),
        ({"faults": True}, "set evaluations to 1 or more"),
    ],
)
def test_a_malformed_folder_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(StoreError, match=says):
        drill(tmp_path, **config)


def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image 0 has 3 bytes, drill takes 2"):
        drill(tmp_path).admit(work(b"abc"), [0], [0])


def test_no_torch_is_loaded() -> None:
    code = "import sys, models.tasks.drill; sys.exit(bool({'torch', 'safetensors', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
