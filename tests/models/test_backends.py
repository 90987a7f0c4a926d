"""One contract for every backend on both backbones; what each says where it cannot work; how auto chooses."""

import dataclasses
import importlib.util
import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from models.backbones.dit import DiT, DiTConfig
from models.backbones.uvit import UViT, UViTConfig
from models.backends import auto, compiled, cudagraph, onnx
from models.backends.interface import BackendUnavailable, Executor, Setup, relative_error
from models.backends.parts import example_rows, make_programs, parts
from models.registry import BACKENDS, resolve
from tests.support import require

PAGE = Path(__file__).parents[2] / "docs" / "add-a-backend.md"
ROWS = (1, 2, 3, 4, 5, 8, 16)
EXACT = ("eager", "onnx", "compiled", "replayed", "cudagraph@cuda", "onnx@cuda")
TOLERANCE = {"page": 3e-2}


def network(kind):
    torch.manual_seed(0)
    if kind == "dit":
        net = DiT(DiTConfig(image_size=8, patch=4, width=32, depth=3, heads=2, classes=3, time_features=16))
    else:
        net = UViT(
            UViTConfig(image_size=8, patch=4, channels=2, width=32, depth=5, heads=2, classes=3, drop_order=kind)
        )
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


def setup_for(kind, folder, device="cpu", **changes):
    net = network(kind).to(device)
    depths = (1, 3) if kind == "dit" else (3, 4, 5)
    given = {"weights": kind * 20, "depths": depths, "rows": 16, "device": torch.device(device), "cache": folder}
    return Setup(net, **given | changes)


def replayed(setup):
    """The cudagraph backend with a stand-in for CUDA: a replay runs the captured function into the same outputs."""

    def capture(run):
        outputs = run()

        def replay():
            for fixed, value in zip(outputs, run(), strict=True):
                fixed.copy_(value)

        return replay, outputs

    return cudagraph.record(setup, capture)


def page_backend(setup):
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    module = types.ModuleType("bfloat16")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module.build(setup)


def built(name, setup):
    others = {"replayed": replayed, "page": page_backend}
    return (others.get(name) or resolve(BACKENDS, name))(setup)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Backends by (name, network), each built once; torch.compile without code generation, for its time."""
    folder, made = tmp_path_factory.mktemp("cache"), {}

    def get(name, kind):
        plain, _, device = name.partition("@")
        if device and not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        if (name, kind) not in made:
            setup = setup_for(kind, folder, device or "cpu")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compiled, "COMPILER", "eager")
                made[name, kind] = setup, built(plain, setup)
        return made[name, kind]

    return get


def inputs(setup, rows, seed=0):
    """x, condition and depths that mix all of the setup's, in unequal shares."""
    x, t, label = example_rows(setup, rows)
    pick = torch.randint(len(setup.depths), (rows,), generator=torch.Generator().manual_seed(seed + rows))
    depths = sorted((setup.depths[i] for i in pick), reverse=True)
    return x, setup.backbone.condition(t, label), depths


@pytest.mark.parametrize("kind", ["dit", "middle"])
@pytest.mark.parametrize("name", [*EXACT, "page"])
def test_equal_to_the_backbone_at_every_batch_size_and_depth(shared, name, kind):
    setup, backend = shared(name, kind)
    for rows in ROWS:
        x, condition, mixed = inputs(setup, rows)
        for depths in (mixed, [max(setup.depths)] * rows, [min(setup.depths)] * rows):
            expected, expected_ran = setup.backbone(x, condition, depths)
            with torch.compiler.set_stance("fail_on_recompile"):  # `build` left nothing to compile
                found, ran = backend(x, condition, depths)
            assert relative_error(found, expected) < TOLERANCE.get(name, 1e-4), (rows, depths)
            assert ran == expected_ran


@pytest.mark.parametrize("kind", ["dit", "middle"])
@pytest.mark.parametrize("name", EXACT)
def test_condition_is_the_backbone_s(shared, name, kind):
    setup, backend = shared(name, kind)
    for rows in (1, 8, 11):
        _, t, label = example_rows(setup, rows)
        assert relative_error(backend.condition(t, label), setup.backbone.condition(t, label)) < 1e-4


@pytest.mark.parametrize("name", EXACT)
def test_what_a_call_returned_is_left_alone_by_the_next(shared, name):
    setup, backend = shared(name, "middle")
    x, condition, depths = inputs(setup, 4)
    _, t, label = example_rows(setup, 8)
    output, block = backend(x, condition, depths)[0], backend.condition(t, label)
    before = output.clone(), block.clone()
    backend(-x, condition * 2, depths)
    backend.condition(t * 0.5, label)
    assert torch.equal(output, before[0])
    assert torch.equal(block, before[1])


def test_a_depth_it_was_not_built_for_is_refused(tmp_path):
    setup = setup_for("dit", tmp_path, depths=(1, 3))
    backend = built("eager", setup)
    x, condition, _ = inputs(setup, 2)
    with pytest.raises(ValueError, match=r"depths \[1, 3\], not \[1, 2\]"):
        backend(x, condition, [2, 1])


def test_more_rows_than_a_cuda_graph_was_captured_for_are_refused(shared):
    setup, backend = shared("replayed", "dit")
    with pytest.raises(ValueError, match=r"17 network rows.*16 at most"):
        backend(*inputs(setup, 17))


@pytest.mark.parametrize(("rows", "buckets"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 8]), (8, [1, 2, 4, 8])])
def test_buckets_are_powers_of_two_that_hold_the_rows(rows, buckets):
    assert cudagraph.buckets_up_to(rows) == buckets


def test_inductor_compiles_the_smallest_part(tmp_path):
    require("g++")
    setup = setup_for("dit", tmp_path, depths=(3,))
    leave = parts(setup, setup.segments)[-1]
    program = compiled.compile_part(leave)
    with torch.inference_mode():
        for rows in (1, 5):
            given = leave.example(rows)
            assert relative_error(program(*given)[0], leave.run(*given)[0]) < 1e-4


# Exports


@pytest.fixture
def one_depth(tmp_path):
    """The cheapest thing to export: one part, of a network with one segment."""
    setup = setup_for("dit", tmp_path, depths=(3,))
    return setup, parts(setup, setup.segments)[-1]


def test_a_good_export_is_loaded_and_a_damaged_or_foreign_one_made_again(one_depth, caplog):
    setup, part = one_depth
    given = part.example(3)

    def made_by(setup):
        exports = onnx.Exports(setup)
        assert relative_error(exports.program(part)(*given)[0], part.run(*given)[0]) < 1e-4
        return exports.made

    assert made_by(setup) == 1
    assert made_by(setup) == 0
    [path] = (setup.cache / "onnx").rglob("*.onnx")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert made_by(setup) == 1
    assert "is damaged: exported again" in caplog.text
    [path] = (setup.cache / "onnx").rglob("*.onnx")
    other = dataclasses.replace(setup, weights="ffff" * 16)
    stolen = onnx.Exports(other).folder / path.name
    stolen.parent.mkdir()
    stolen.write_bytes(path.read_bytes())
    assert made_by(other) == 1
    assert f"offramp.weights {setup.weights}, not {other.weights}: exported again" in caplog.text
    assert made_by(other) == 0
    setup.backbone.head.weight *= 2
    assert made_by(other) == 1
    assert "differs from the network by" in caplog.text
    assert not list(setup.cache.rglob("*.new"))


def test_a_cache_that_cannot_be_written_says_which_setting_to_change(one_depth):
    setup, part = one_depth
    setup.cache.joinpath("onnx").write_text("in the way")
    with pytest.raises(BackendUnavailable, match="set OFFRAMP_CACHE_DIR"):
        onnx.Exports(setup).program(part)


def test_sessions_bound_to_addresses_as_on_cuda_give_the_same(shared):
    setup, backend = shared("onnx", "middle")
    for part in parts(setup, backend.segments):
        bound = onnx.BoundSession(backend.network.programs[part.name].session, part, setup.device)
        given = part.example(5)
        for found, expected in zip(bound(*given), part.run(*given), strict=True):
            assert relative_error(found, expected) < 1e-4


def test_a_segment_too_large_for_a_file_is_cut_where_it_changes_nothing(tmp_path, monkeypatch):
    setup = setup_for("dit", tmp_path, depths=(1, 3))
    weights = sum(4 * p.numel() for p in setup.backbone.parameters())
    assert onnx.short_segments(setup) == setup.segments
    monkeypatch.setattr(onnx, "LIMIT_BYTES", weights // 2)
    short = onnx.short_segments(setup)
    assert [(s.start, s.stop, s.rank) for s in short] == [(0, 1, 0), (1, 2, 2), (2, 3, 2)]
    x, condition, _ = inputs(setup, 4)
    cut = Executor("cut", "", setup, setup.backbone, short)(x, condition, [3, 3, 1, 1])
    whole = setup.backbone(x, condition, [3, 3, 1, 1])
    assert torch.equal(cut[0], whole[0])
    assert cut[1] == whole[1]


# Where a backend cannot work


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("onnx", "onnxruntime", "onnxruntime is not installed: install the extra"),
        ("onnx", "onnxscript", "needs the package onnxscript"),
        ("compiled", "g++", r"needs a C\+\+ compiler: install g\+\+"),
        ("cudagraph", "", "need a CUDA device, this is cpu"),
    ],
)
def test_a_backend_that_cannot_work_says_why(tmp_path, monkeypatch, name, missing, words):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    if missing == "g++":
        monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendUnavailable, match=words):
        resolve(BACKENDS, name)(setup_for("dit", tmp_path))


def test_a_build_gives_up_when_its_pace_misses_the_deadline(tmp_path):
    setup = setup_for("dit", tmp_path, deadline=time.monotonic() - 1)
    made = []
    with pytest.raises(BackendUnavailable, match="building takes about"):
        make_programs(setup, setup.segments, lambda part: made.append(part) or part.run)
    assert len(made) == 1


# auto


class Changed(Executor):
    """Eager with its output changed by a function of the output."""

    def __init__(self, name, setup, change):
        super().__init__(name, "made for the test", setup, setup.backbone)
        self.change = change

    def __call__(self, x, condition, depths):
        output, ran = super().__call__(x, condition, depths)
        return self.change(output), ran


def absent(setup):
    raise BackendUnavailable("no such luck")


def fail(output):
    raise RuntimeError("out of luck")


FAKES = {
    "equal": lambda setup: Changed("equal", setup, lambda out: out * (1 + 1e-6)),
    "twin": lambda setup: Changed("twin", setup, lambda out: out),
    "wrong": lambda setup: Changed("wrong", setup, lambda out: out * 1.001),
    "mixing": lambda setup: Changed("mixing", setup, lambda out: out + 1e-6 * len(out)),
    "failing": lambda setup: Changed("failing", setup, fail),
    "absent": absent,
}


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """auto over fakes, with seconds by (backend, rows) from `speed`: eager takes 1."""
    monkeypatch.setitem(sys.modules, "fake_backends", types.SimpleNamespace(**FAKES))
    for name in FAKES:
        monkeypatch.setitem(BACKENDS, name, f"fake_backends:{name}")

    def run(speed, **changes):
        def measure(backend, probe):
            return speed[backend.name](len(probe.depths)) if backend.name in speed else 1.0

        return auto.build(setup_for("dit", tmp_path, **changes), tuple(speed), measure)

    return run


def test_auto_takes_the_fastest_and_says_why(choose):
    best = choose({"equal": lambda rows: 0.5, "twin": lambda rows: 0.8, "absent": None})
    assert best.name == "equal"
    assert best.note.startswith("equal: made for the test; picked by measurement against eager: ")
    for words in ("equal: 2.00x at 1 rows, 2.00x at 2 rows, 2.00x at 8 rows", "twin: 1.25x", "absent: no such luck"):
        assert words in best.note


def test_auto_keeps_eager_where_a_rival_is_slower_anywhere_or_gains_little(choose):
    assert choose({"equal": lambda rows: 1.1 if rows == 8 else 0.1}).name == "eager"
    assert choose({"equal": lambda rows: 0.97}).name == "eager"


@pytest.mark.parametrize(
    ("name", "words"),
    [("wrong", "differs from eager by"), ("mixing", "bits change with"), ("failing", "failed at 1 rows: out of luck")],
)
def test_auto_refuses_what_promises_less_than_eager_however_fast(choose, name, words):
    best = choose({name: lambda rows: 0.01, "twin": lambda rows: 0.9})
    assert best.name == "twin"
    assert words in best.note


def test_auto_stops_measuring_when_its_budget_is_spent(choose):
    best = choose({"equal": lambda rows: 0.5}, budget_s=0.0)
    assert best.name == "equal"
    assert "at 1 rows" in best.note
    assert "at 2 rows" not in best.note
