"""The toys keep the Task contract that the engine's tests rely on."""

from __future__ import annotations

import pytest

from models.api import Task
from tests.service.worker.toy import BAD_STEP, ToyClassify, ToyGenerate, Trouble, pixels
from tests.service.worker.work import draw


def test_both_are_tasks() -> None:
    assert isinstance(ToyGenerate(), Task)
    assert isinstance(ToyClassify(), Task)


def test_a_row_goes_on_elsewhere() -> None:
    first, second, work = ToyGenerate(), ToyGenerate(), draw(2, steps=3, seed=7).work
    first.admit(work, [0, 1], [0, 1])
    assert first.save([0, 1]) == [b"", b""]
    assert first.preview([0]) == [None]
    first.step([0, 1])
    first.step([1])
    assert second.restore(work, [1, 0], [2, 3], first.save([1, 0])) == [1, 2]
    assert [shown is not None and shown.tolist() for shown in second.preview([2])] == [pixels(8, 2).tolist()]
    second.step([2, 3])
    second.step([3])
    assert [row.pixels.tolist() for row in second.collect([3, 2])] == [pixels(seed, 3).tolist() for seed in (7, 8)]
    assert second.evaluated == [(8, 2), (7, 1), (7, 2)]
    with pytest.raises(ValueError, match="another row"):
        second.restore(work, [0], [0], first.save([1]))


def test_a_step_that_raises_moves_no_row() -> None:
    task = ToyGenerate()
    task.admit(draw().work, [0], [0])
    task.admit(draw(label=BAD_STEP).work, [0], [1])
    with pytest.raises(Trouble):
        task.step([0, 1])
    assert task.evaluated == []
    assert task.save([0]) == [b""]
