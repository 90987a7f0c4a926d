from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from service import logs


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_one_line_with_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("info")
    logging.getLogger("some.part").info("job %s finished", 7, extra={"model": "toy", "why": 'a "b"\nc', "run_s": 0.25})
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert ' level=info logger=some.part msg="job 7 finished" model=toy why="a \\"b\\"\\nc" run_s=0.25\n' in line


def test_traceback_stays_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("info")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("oops")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert 'trace="Traceback' in line
    assert "ValueError: broken" in line


def test_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("warning")
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert "loud" in (written := capsys.readouterr().err)
    assert "quiet" not in written
