"""What a GPU's tick is made of, without one: packed copies, one tick ahead, late pixels, captured updates, bfloat16."""

import dataclasses
import gc
import json
import shutil

import numpy as np
import pytest
import torch

from models.api import GenerateWork, Runtime, UserError
from models.backends import auto, cudagraph, onnx
from models.backends.interface import BackendUnavailable, Executor, relative_error
from models.backends.parts import example_rows
from models.backends.precision import Bfloat16, at_precision, choose
from models.registry import BACKENDS, resolve
from models.store import ZOO
from models.tasks.decoding import DecodeStage
from models.tasks.device import OneAhead, Readback, Uplink
from models.tasks.generate import GenerateTask
from models.tasks.generator import load
from tests.models.test_backends import inputs, network, replayed, setup_for

CPU = torch.device("cpu")


def test_nothing_is_collected_while_a_graph_is_captured():
    with cudagraph.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), cudagraph.uncollected():
        1 / 0  # noqa: B018
    assert gc.isenabled()


# Copies


def test_packed_arrays_arrive_as_they_were():
    sent = [
        np.arange(5),
        np.array([], np.int64),
        np.array([[1.5, -2.0]], np.float32),
        np.array([True, False, True]),
        np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:3],
        np.array([-7], np.int16),
    ]
    for found, array in zip(Uplink(CPU, packed=True).send(*sent), sent, strict=True):
        assert found.dtype == torch.from_numpy(array.copy()).dtype
        np.testing.assert_array_equal(found.numpy(), array)


def test_a_packed_copy_is_not_the_host_s_memory_any_more():
    array = np.arange(4)
    [sent] = Uplink(CPU, packed=True).send(array)
    array[:] = 0
    assert sent.tolist() == [0, 1, 2, 3]


def test_arrays_are_written_where_a_tensor_lies():
    to = torch.zeros(4, 3, dtype=torch.int64)
    where = to.data_ptr()
    Uplink(CPU).write(to[:2], np.array([[1, 2, 3], [4, 5, 6]]))
    assert to.data_ptr() == where
    assert to.tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0], [0, 0, 0]]


def test_the_host_waits_for_the_tick_before_and_never_for_its_own():
    said, ticks = [], iter(range(9))

    def mark():
        number = next(ticks)
        said.append(f"queued {number}")
        return lambda: said.append(f"waited for {number}")

    ahead = OneAhead(mark)
    for _ in range(3):
        ahead.queued()
    assert said == ["queued 0", "queued 1", "waited for 0", "queued 2", "waited for 1"]


# A row's last step, in which its pixels travel


class Later:
    """A copy that is complete when somebody waits for it."""

    def __init__(self):
        self.waited = 0

    def __call__(self, value):
        host = torch.zeros_like(value)

        def wait():
            self.waited += 1
            host.copy_(value)

        return host, wait


def small(task_rows=4, runtime=Runtime()):
    return load(ZOO / "fashion-dit", task_rows, "cpu", runtime)


def work(rows=2, steps=3, **changes):
    base = {"labels": tuple(range(rows)), "seeds": tuple(range(rows)), "steps": steps, "solver": "ddpm"}
    return GenerateWork(**({"model": "fashion-dit", "guidance": 2.0, "gear": "balanced"} | base | changes))


def drawn(task, *jobs):
    """Rows of jobs that share every tick."""
    first, left = 0, {}
    places = []
    for job in jobs:
        slots = list(range(first, first + job.rows))
        left |= dict(zip(slots, task.admit(job, range(job.rows), slots), strict=True))
        places.append(slots)
        first += job.rows
    steps = dict(left)
    while any(left.values()):
        listed = [slot for slot, n in left.items() if n]
        task.step(listed)
        left = {slot: n - (slot in listed) for slot, n in left.items()}
    return [task.collect(slots) for slots in places], steps


def test_pixels_that_travel_beside_the_next_tick_are_the_same():
    plain, late = small(), small()
    late.readback = Readback(Later())
    jobs = work(2, 3), work(1, 4, seeds=(9,))
    (expected, steps), (found, more) = drawn(plain, *jobs), drawn(late, *jobs)
    assert {slot: n + 1 for slot, n in steps.items()} == more
    for rows, others in zip(expected, found, strict=True):
        for row, other in zip(rows, others, strict=True):
            np.testing.assert_array_equal(row.pixels, other.pixels)
            assert dataclasses.replace(row, pixels=other.pixels) == other


def test_pixels_are_sent_when_their_row_ends_and_waited_for_when_it_is_collected():
    task, copy = small(), Later()
    task.readback = Readback(copy)
    task.admit(work(1, 2), [0], [3])
    task.step([3])
    assert 3 not in task.readback
    task.step([3])
    assert 3 in task.readback
    stats = task.step([3])
    assert (stats.rows, stats.layer_evals, stats.waiting, copy.waited) == (0, 0, frozenset(), 0)
    [row] = task.collect([3])
    assert copy.waited == 1
    assert row.pixels.any()
    assert 3 not in task.readback


def test_a_slot_given_to_a_new_row_forgets_the_old_one_s_pixels():
    task = small()
    task.readback = Readback(Later())
    task.admit(work(1, 1), [0], [0])
    task.step([0])
    assert 0 in task.readback
    task.admit(work(1, 1, seeds=(5,)), [0], [0])
    assert 0 not in task.readback


def test_a_row_restored_at_its_end_has_its_pixels_sent():
    task = small()
    job = work(1, 2)
    task.admit(job, [0], [0])
    for _ in range(2):
        task.step([0])
    [state] = task.save([0])
    [expected] = task.collect([0])
    task.readback = Readback(Later())
    assert task.restore(job, [0], [1], [state]) == [1]
    task.step([1])
    assert 1 in task.readback
    np.testing.assert_array_equal(task.collect([1])[0].pixels, expected.pixels)


def test_admission_leaves_the_device_alone_until_the_first_step():
    """So that rows that come one by one begin together; their noise is their own all the same."""
    alone, together = small(), small()
    before = together.pool.states.clone()
    for slot in range(3):
        together.admit(work(1, 2, seeds=(slot,)), [0], [slot])
    assert torch.equal(together.pool.states, before)
    together.step([0, 1, 2])
    alone.admit(work(1, 2, seeds=(2,)), [0], [2])
    alone.step([2])
    torch.testing.assert_close(alone.pool.x[2], together.pool.x[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.pool.x[0], together.pool.x[2])


def test_a_slot_s_next_row_begins_with_nothing_of_the_one_before():
    fresh, used = small(), small()
    used.admit(work(1, 3, solver="dpmpp_2m"), [0], [1])
    for _ in range(3):
        used.step([1])
    for task in (fresh, used):
        task.admit(work(1, 3, seeds=(7,), solver="dpmpp_2m"), [0], [1])
        task.step([1])
    assert torch.equal(fresh.pool.states[:, 1], used.pool.states[:, 1])


def test_decoded_pixels_are_waited_for_when_they_are_kept():
    copy = Later()
    stage = DecodeStage(Halving(), 4, (1, 2, 2), copy=copy)
    stage.enter([2])
    started = stage.decode(torch.ones(1, 1, 2, 2))
    assert copy.waited == 0
    stage.keep([2], *started)
    assert copy.waited == 1
    assert stage.pixels[2].ravel().tolist() == [191] * 4


class Halving:
    """A codec whose pixels are half its states."""

    free = True

    def image_shape(self, shape):
        return shape

    def decode(self, states):
        return states / 2


# The same on a CUDA device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["eager", "cudagraph"])
@pytest.mark.parametrize(
    ("solver", "gear", "guidance"),
    [("ddpm", "full", 2.0), ("dpmpp_2m", "balanced", 2.0), ("unipc", "eco", 1.0), ("ddim", "balanced", 1.0)],
)
def test_a_gpu_draws_what_a_cpu_draws(backend, solver, gear, guidance):
    there = load(ZOO / "fashion-dit", 8, "cuda", Runtime(backend=backend))
    chosen = {"solver": solver, "guidance": guidance}
    jobs = work(3, 4, gear=gear, **chosen), work(2, 6, seeds=(9, 10), gear="full", **chosen)
    for asked in (jobs, jobs[:1]):
        expected, _ = drawn(small(8), *asked)
        found, _ = drawn(there, *asked)
        for rows, others in zip(expected, found, strict=True):
            for row, other in zip(rows, others, strict=True):
                assert row.exit_depths == other.exit_depths
                assert row.layer_evals == other.layer_evals
                assert np.abs(row.pixels.astype(int) - other.pixels.astype(int)).max() <= 2


# Captured updates


def captured(task, folder):
    """The task with graphs that are functions run again."""
    depths = tuple({depth for gear in task.info.gears for depth in gear.schedule.depths})
    backend = replayed(dataclasses.replace(setup_for("dit", folder, rows=8), backbone=task.model, depths=depths))
    made = GenerateTask(task.info, task.model, task.process, task.capacity, CPU, backend=backend)
    assert made.pool.states.shape[1] == task.capacity + 1
    return made


def test_updates_in_graphs_give_the_same_states(tmp_path):
    plain = small()
    graphs = captured(plain, tmp_path)
    jobs = work(2, 3), work(1, 4, seeds=(9,), solver="dpmpp_2m", guidance=1.0, gear="full")
    (expected, _), (found, _) = drawn(plain, *jobs), drawn(graphs, *jobs)
    states = plain.pool.states
    assert relative_error(graphs.pool.states[:, :3], states[:, :3]) < 1e-4
    for rows, others in zip(expected, found, strict=True):
        for row, other in zip(rows, others, strict=True):
            assert row.exit_depths == other.exit_depths
            off = np.abs(row.pixels.astype(int) - other.pixels.astype(int))
            assert off.max() <= 1


class Unused:
    """A backend that nobody may call."""

    def __call__(self, *args):
        raise AssertionError("the network is run outside of the tick's graph")

    condition = __call__


@pytest.mark.parametrize(("guidance", "solver"), [(1.0, "ddim"), (2.0, "ddpm")])
def test_rows_of_one_depth_have_their_whole_tick_in_a_graph(tmp_path, guidance, solver):
    plain = small()
    graphs = captured(plain, tmp_path)
    graphs.backend = Unused()
    for rows in (1, 3):
        job = work(rows, 5, guidance=guidance, solver=solver)
        ([expected], _), ([found], _) = drawn(plain, job), drawn(graphs, job)
        for row, other in zip(expected, found, strict=True):
            assert row.exit_depths == other.exit_depths
            assert row.layer_evals == other.layer_evals
            assert np.abs(row.pixels.astype(int) - other.pixels.astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["dit", "output"])
def test_blocks_of_a_whole_tick_are_counted_as_they_ran(tmp_path, kind):
    setup = setup_for(kind, tmp_path)
    backend = replayed(setup)
    for depth in setup.depths:
        x, t, label = example_rows(setup, 3)
        expected, expected_ran = setup.backbone(x, setup.backbone.condition(t, label), [depth] * 3)
        found, ran = backend.uncaptured(x, t, label, depth)
        assert relative_error(found, expected) < 1e-4
        assert ran == expected_ran


def test_rows_that_fill_a_bucket_touch_no_slot(tmp_path):
    task = captured(small(), tmp_path)
    task.admit(work(4, 5), range(4), range(4))
    before = task.pool.states.clone()
    task.step([0, 1, 2])
    changed = (task.pool.states != before).flatten(2).any(2).any(0).tolist()
    assert changed[:4] == [True, True, True, False]


def test_a_tick_that_cannot_be_captured_is_launched_op_by_op(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise BackendUnavailable("CUDA graph capture failed: out of luck")

    monkeypatch.setattr("models.tasks.graphed.TickGraphs", refuse)
    task = captured(small(), tmp_path)
    assert task.graphs is None
    assert "op by op around the network's graphs: CUDA graph capture failed: out of luck" in caplog.text
    [[row]], _ = drawn(task, work(1, 2))
    assert row.pixels.any()


def test_batches_larger_than_any_graph_are_updated_without(tmp_path, monkeypatch):
    monkeypatch.setattr(cudagraph, "MOST_ROWS", 2)
    plain = small()
    graphs = captured(plain, tmp_path)
    assert graphs.graphs.most == 2
    jobs = work(2, 2), work(1, 4, seeds=(9,))
    (expected, _), (found, _) = drawn(plain, *jobs), drawn(graphs, *jobs)
    assert relative_error(graphs.pool.states[:, :3], plain.pool.states[:, :3]) < 1e-4
    assert [len(rows) for rows in found] == [len(rows) for rows in expected]


# Graphs of large batches


@pytest.mark.parametrize(
    ("rows", "last"),
    [(16, [4, 8, 16]), (17, [8, 16, 20]), (40, [28, 32, 40]), (65, [56, 64, 72]), (4096, [224, 240, 256])],
)
def test_buckets_are_finer_where_padding_costs_more(rows, last):
    found = cudagraph.buckets_up_to(rows)
    assert found[-3:] == last
    assert found == sorted(set(found))


@pytest.mark.parametrize("kind", ["dit", "middle", "output"])
def test_batches_larger_than_any_graph_run_without_in_part_or_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cudagraph, "MOST_ROWS", 4)
    setup = setup_for(kind, tmp_path)
    backend = replayed(setup)
    for rows in (3, 4, 5, 7, 16):
        x, condition, depths = inputs(setup, rows)
        for chosen in (depths, [max(depths)] * rows):
            expected, expected_ran = setup.backbone(x, condition, chosen)
            found, ran = backend(x, condition, chosen)
            assert relative_error(found, expected) < 1e-4, (rows, chosen)
            assert ran == expected_ran


def test_parts_are_prepared_before_they_are_captured(tmp_path):
    seen = []

    def prepare(part):
        seen.append(part.name)
        return part

    setup = setup_for("dit", tmp_path, rows=2)
    backend = cudagraph.record(setup, lambda run: (lambda: None, run()), "other", prepare)
    assert seen == ["condition", "enter", "segment-0-1", "segment-1-3", "leave"]
    assert backend.name == "other"
    assert backend.note.startswith("other: 10 CUDA graphs for up to 2 rows")


def test_compiled_graphs_need_a_gpu_too(tmp_path, monkeypatch):
    monkeypatch.setattr(cudagraph, "check_tools", lambda device: None)
    with pytest.raises(BackendUnavailable, match="need a CUDA device, this is cpu"):
        resolve(BACKENDS, "compiled_cudagraph")(setup_for("dit", tmp_path))


# bfloat16


@pytest.mark.parametrize("kind", ["dit", "output"])
def test_bfloat16_is_near_and_float32_outside(tmp_path, kind):
    setup = setup_for(kind, tmp_path)
    low = at_precision(setup.backbone, "bf16")
    assert isinstance(low, Bfloat16)
    with pytest.raises(TypeError, match="at_precision"):
        Bfloat16.from_config({})
    for rows in (1, 5):
        x, condition, depths = inputs(setup, rows)
        expected, expected_ran = setup.backbone(x, condition, depths)
        found, ran = low(x, condition.bfloat16(), depths)
        assert found.dtype == torch.float32
        assert ran == expected_ran
        assert 0 < relative_error(found, expected) < 5e-2
    assert next(setup.backbone.parameters()).dtype == torch.float32


def test_backends_run_bfloat16_within_its_tolerance(tmp_path):
    plain = setup_for("middle", tmp_path)
    setup = dataclasses.replace(plain, backbone=at_precision(plain.backbone, "bf16"), precision="bf16")
    assert (plain.tolerance, setup.tolerance) == (1e-4, 5e-2)
    for backend in (resolve(BACKENDS, "eager")(setup), replayed(setup)):
        x, condition, depths = inputs(setup, 5)
        found, _ = backend(x, condition, depths)
        assert relative_error(found, setup.backbone(x, condition, depths)[0]) < setup.tolerance
    with pytest.raises(BackendUnavailable, match="exports run in fp32"):
        onnx.build(setup)


class Off(Executor):
    """Eager, off by a hundredth."""

    def __call__(self, x, condition, depths):
        output, ran = super().__call__(x, condition, depths)
        return output * 1.01, ran


@pytest.mark.parametrize(("precision", "words"), [("fp32", "differs from eager by 1.0e-02 at 2 rows"), ("bf16", "")])
def test_auto_judges_by_the_precision_s_tolerance(tmp_path, precision, words):
    plain = setup_for("dit", tmp_path)
    setup = dataclasses.replace(plain, backbone=at_precision(plain.backbone, precision), precision=precision)
    eager, off = resolve(BACKENDS, "eager")(setup), Off("off", "", setup, setup.backbone)
    assert auto.fault(off, eager, auto.Probe.make(setup, 2), setup.tolerance) == words


@pytest.mark.parametrize(
    ("wanted", "promised", "device", "chosen"),
    [
        ("auto", "fp32", "cuda", "fp32"),
        ("auto", "bf16", "cuda", "bf16"),
        ("auto", "bf16", "cpu", "fp32"),
        ("bf16", "fp32", "cpu", "bf16"),
        ("fp32", "bf16", "cuda", "fp32"),
    ],
)
def test_auto_goes_by_the_model_s_promise_and_the_device(wanted, promised, device, chosen):
    assert choose(wanted, promised, torch.device(device)) == chosen


@pytest.mark.parametrize(("wanted", "promised"), [("half", "fp32"), ("auto", "fp16")])
def test_other_precisions_are_refused(wanted, promised):
    with pytest.raises(UserError, match="precision must be"):
        choose(wanted, promised, CPU)


def test_a_bfloat16_generator_draws_nearly_the_same(tmp_path):
    folder = shutil.copytree(ZOO / "fashion-dit", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"precision": "bf16"}))
    runs = {name: load(folder, 2, "cpu", Runtime(precision=name)) for name in ("auto", "bf16")}
    assert "bf16: eager" in runs["bf16"].info.backend
    assert runs["auto"].info.backend.startswith("eager")
    job = work(1, 4, solver="ddim", gear="full")
    pixels = {name: drawn(task, job)[0][0][0].pixels.astype(int) for name, task in runs.items()}
    off = np.abs(pixels["auto"] - pixels["bf16"])
    assert 0 < off.mean() < 4
    assert network("dit").embed.weight.dtype == torch.float32
