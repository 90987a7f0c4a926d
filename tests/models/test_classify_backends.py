"""/classify by other backends: the same answers, exports kept, and eager with a reason where one does not fit."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from models.api import Runtime
from models.backends import compiled, independent, onnx
from models.backends.interface import Place, relative_error
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from models.tasks.parts import parts
from tests.models.classifiers import (
    IMAGES,
    LIGHT,
    SHAPE,
    make_zoo,
    run,
    served,
    work,
    write_bridges,
    write_distance,
    write_exits,
    write_student,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One member, a student, a bridge that sees the tap alone and one that sees everything: exporting takes time."""
    root = tmp_path_factory.mktemp("zoo")
    folder, seeing = make_zoo(root, members=1), dataclasses.replace(LIGHT, features=4 * SHAPE.width, logits=True)
    entries = {"bridge": served(["plain"], 5), "bridges": served(["plain", "seeing"], 1, 0.2)}
    write_bridges(root, entries, {"plain": LIGHT, "seeing": seeing})
    write_student(root)
    write_distance(root)
    return folder


@pytest.fixture(scope="module")
def eager(folder):
    return load(folder, 12, "cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def same_answers(task, eager):
    for method in eager.info.methods:
        rows, expected = (run(t, work(method, *IMAGES[:5])) for t in (task, eager))
        for row, wanted in zip(rows, expected, strict=True):
            assert row.probabilities == pytest.approx(wanted.probabilities, rel=1e-3, abs=1e-5), method
            assert row.uncertainty == pytest.approx(wanted.uncertainty, rel=1e-3, abs=1e-4), method


def test_exports_answer_as_eager_and_are_kept(folder, eager, cache):
    task = load(folder, 12, "cpu", Runtime(backend="onnx", cache=str(cache)))
    count = len(parts(load_classifier(folder)))
    assert task.info.backend.startswith(f"onnx: CPUExecutionProvider, {count} networks ({count} exported)")
    same_answers(task, eager)
    again = load(folder, 12, "cpu", Runtime(backend="onnx", cache=str(cache)))
    assert f"{count} networks (0 exported)" in again.info.backend
    assert len({path.parent for path in cache.rglob("*.onnx")}) == 1


def test_exits_that_move_are_exported_again(tmp_path):
    folder, cache = make_zoo(tmp_path, members=1), str(tmp_path / "cache")
    write_exits(tmp_path)
    load(folder, 12, "cpu", Runtime(backend="onnx", cache=cache))
    write_exits(tmp_path, thresholds=[None, 0.665])
    moved = load(folder, 12, "cpu", Runtime(backend="onnx", cache=cache))
    assert moved.info.backend.startswith("onnx: CPUExecutionProvider")
    same_answers(moved, load(folder, 12, "cpu"))


def test_an_export_with_other_inputs_is_made_again(folder, tmp_path):
    place = Place(weights="w", rows=12, device=torch.device("cpu"), cache=tmp_path)
    member, *_, bridge = parts(load_classifier(folder))
    onnx.Exports(place).program(dataclasses.replace(bridge, name=member.name))
    exports = onnx.Exports(place)
    program, x = exports.program(member), member.example(3)
    assert exports.made == 1
    assert max(map(relative_error, program(*x), member.run(*x))) < 1e-4


def test_compiled_networks_answer_as_eager(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    folder = make_zoo(tmp_path, members=1)
    task = load(folder, 12, "cpu", Runtime(backend="compiled"))
    assert task.info.backend.startswith("compiled: torch.compile, 2 networks")
    same_answers(task, load(folder, 12, "cpu"))


def test_a_backend_that_does_not_fit_leaves_eager_and_says_so(folder, eager):
    task = load(folder, 12, "cpu", Runtime(backend="cudagraph"))
    assert task.info.backend == "eager: cudagraph is not used: cudagraph runs diffusion backbones only"
    assert eager.info.backend == "eager: the networks op by op"
    same_answers(task, eager)


@pytest.mark.parametrize("backend", ["onnx", "auto"])
def test_without_onnxruntime_it_runs_eagerly_and_says_why(folder, monkeypatch, tmp_path, backend):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    task = load(folder, 12, "cpu", Runtime(backend=backend, cache=str(tmp_path)))
    assert task.info.backend.startswith("eager: ")
    assert "onnxruntime is not installed: install the extra" in task.info.backend
    assert run(task, work("bridges", IMAGES[0]))


def test_auto_gives_up_a_build_that_outlasts_its_budget(folder, tmp_path):
    task = load(folder, 12, "cpu", Runtime(backend="auto", cache=str(tmp_path), budget_s=1e-9))
    assert task.info.backend == (
        "eager: the networks op by op; picked by measurement against eager: onnx: the time was up after 0 of 4 networks"
    )


# auto, over a stand-in for onnx


@pytest.fixture
def choose(folder, monkeypatch):
    """auto, its rival the networks times `factor`; `speed` gives seconds of a call by (is the rival, rows)."""
    found = parts(load_classifier(folder))
    eager = {part.name: part.run for part in found}

    def run(speed, factor=1.0):
        rival = {name: lambda *given, f=f: [out * factor for out in f(*given)] for name, f in eager.items()}
        monkeypatch.setattr(
            independent, "make", lambda name, parts, place, deadline: (rival, f"{name}: made for the test")
        )

        def measure(program, part, rows):
            return speed(program is rival[part.name], rows)

        place = Place(weights="", rows=16, device=torch.device("cpu"), cache=Path())
        programs, note = independent.choose(eager, found, place, measure)
        return programs is rival, note

    return run


def test_auto_takes_the_faster(choose):
    taken, note = choose(lambda rival, rows: 0.5 if rival else 1.0)
    assert taken
    assert note == (
        "onnx: made for the test; picked by measurement against eager: onnx: 2.00x at 1 rows, 2.00x at 8 rows, "
        "2.00x at 16 rows"
    )


@pytest.mark.parametrize(
    "speed",
    [
        lambda rival, rows: 2.0 if rival else 1.0,
        lambda rival, rows: (1.2 if rows == 8 else 0.1) if rival else 1.0,
        lambda rival, rows: 0.97 if rival else 1.0,
    ],
)
def test_auto_keeps_eager_where_the_rival_is_slower_anywhere_or_gains_little(choose, speed):
    taken, note = choose(speed)
    assert not taken
    assert note.startswith("eager: the networks op by op; picked by measurement against eager: onnx: ")


def test_auto_refuses_other_numbers_however_fast(choose):
    taken, note = choose(lambda rival, rows: 0.01 if rival else 1.0, factor=1.001)
    assert not taken
    assert "onnx: source differs from eager by 1.0e-03 at 1 rows" in note


def test_programs_agree_part_by_part(folder, cache):
    classifier = load_classifier(folder)
    place = Place(weights=classifier.networks_digest, rows=12, device=torch.device("cpu"), cache=cache, budget_s=60.0)
    programs, _ = independent.build("onnx", parts(classifier), place)
    for part in parts(classifier):
        for rows in (1, 2, 7, 12):
            given = part.example(rows)
            for found, expected in zip(programs[part.name](*given), part.run(*given), strict=True):
                assert relative_error(found, expected) < 1e-4, (part.name, rows)
