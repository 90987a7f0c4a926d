"""The comparison with peers: what can be wrong with its numbers where no peer is installed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_peers import command
from benchmarks.bench_queue import load
from benchmarks.http_client import body_of
from benchmarks.peers import accounting, quality, venvs
from benchmarks.peers.accounting import Process, Usage, family, foreign, parse_machine, parse_stat
from benchmarks.peers.campaign import Campaign, Plan
from benchmarks.peers.cells import (
    bars,
    best_goodput,
    capacities,
    deadline_ms,
    kept,
    line,
    of,
    read,
    recovery,
    short,
    summary,
    survived,
)
from benchmarks.peers.contestants import contestant, requests
from benchmarks.peers.figures import LOST, OK, goodput, kill_figures, load_figures, window
from benchmarks.peers.plots import points, stamps
from benchmarks.peers.quality import cited
from benchmarks.peers.report import END, START, bold, filled, readme
from benchmarks.peers.tables import back, percent, section
from benchmarks.peers.work import Setup, run
from models.api import GenerateWork
from models.store import ZOO

TICKS = os.sysconf("SC_CLK_TCK")


def test_goodput_counts_right_answers_in_time_and_nothing_else() -> None:
    seen = [(0.0, 0.1, 200), (0.1, 0.1001, 200), (0.2, 0.05, 504), (0.3, 0.05, 0), (0.4, 0.02, 200)]
    assert goodput(seen, 0.1, 2.0) == 1.0
    figures = load_figures(seen, 2.0, 0.1)
    assert (figures["answered_per_s"], figures["offered_per_s"], figures["failed"]) == (1.5, 2.5, 2)
    assert figures["statuses"] == {"200": 3, "504": 1, "0": 1}
    assert figures["p99_ms"] == pytest.approx(100.1)


def test_no_answer_has_no_latency() -> None:
    figures = load_figures([(0.0, 5.0, 0)], 1.0, 1.0)
    assert (figures["p50_ms"], figures["goodput_per_s"], figures["failed"]) == (None, 0.0, 1)


def test_window_is_by_arrival_or_by_end() -> None:
    seen = [(0.5, 1.0, 200), (1.5, 1.0, 200)]
    assert window(seen, 1.0, 2.0, "due") == [seen[1]]
    assert window(seen, 1.0, 2.0, "end") == [seen[0]]


def test_a_kill_forgives_refusals_and_counts_every_loss() -> None:
    before = [(0.1, 0.1, 200), (0.2, 0.1, 503), (0.9, 0.2, 503), (0.95, 9.0, 0)]
    after = [(1.1, 0.0, -1), (1.2, 0.1, 503), (1.3, 0.1, 429), (1.4, 0.1, 500), (3.0, 0.5, 200)]
    found = kill_figures(before + after, killed_s=1.0)
    assert (found["refused"], found["accepted"], found["answered"]) == (4, 5, 2)
    assert (found["held"], found["saved"]) == (2, 0)
    assert found["share"] == 0.4
    assert found["back_s"] == 2.5


def test_who_never_comes_back_says_so() -> None:
    found = kill_figures([(0.1, 0.1, 200), (1.1, 0.0, -1)], killed_s=1.0)
    assert (found["share"], found["back_s"]) == (1.0, None)


def test_stat_lines_are_read_past_any_command() -> None:
    fields = ["S", "7", *["0"] * 9, "150", "50", "900", "900", *["0"] * 4, "4242", "0"]
    found = parse_stat(f"12 (a) b (c) {' '.join(fields)}")
    assert found == Process(pid=12, parent=7, began=4242, cpu_s=200 / TICKS)
    assert parse_machine("cpu  100 20 30 9000 50 7 8 5 60 0\ncpu0 1 1 1 1\n") == 155 / TICKS


def test_a_family_is_roots_and_descendants() -> None:
    table = [Process(pid, parent, 0, 0.0) for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 4))]
    assert set(family([2, 99], table)) == {2, 3}
    assert set(family([2, 4], table)) == {2, 3, 4, 5}


def test_foreign_load_is_what_nobody_of_ours_used() -> None:
    before = Usage(at=10.0, machine_s=100.0, own={(1, 5): 3.0, (2, 5): 1.0}, here_s=1.0)
    # a process ended, one came, and one pid was given to another process
    after = Usage(at=14.0, machine_s=108.0, own={(1, 5): 5.0, (2, 9): 0.5, (3, 9): 1.5}, here_s=1.25)
    assert accounting.own_s(before, after) == 4.0
    assert foreign(before, after, client_s=1.75) == pytest.approx((8.0 - 4.0 - 1.75 - 0.25) / 4)
    assert foreign(before, before.__class__(14.0, 100.0, before.own, 1.0), 1.0) == 0.0


def test_marked_processes_and_their_children_are_found() -> None:
    mark = f"test-{os.getpid()}"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'], env={})"
    parent = subprocess.Popen([sys.executable, "-c", child], env={accounting.MARK: mark}, start_new_session=True)
    try:
        end = time.monotonic() + 20
        while len(found := accounting.members(mark)) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert len(found) == 2
        assert parent.pid in found
        assert accounting.resident_mib(found)["rss"] > 5
    finally:
        for pid in accounting.members(mark):
            os.kill(pid, 9)
        parent.wait()
    assert not accounting.members(mark)


def test_an_app_reads_the_setup_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("mixed", 8123, 4, 2.5, 0.3, "/nowhere/worker.pid")
    for name, value in setup.environment().items():
        monkeypatch.setenv(name, value)
    assert Setup.read() == setup


def test_requests_are_the_same_every_time_and_mixed_where_they_should_be() -> None:
    assert requests("mixed") == requests("mixed")
    steps = [request["steps"] for request in requests("mixed")]
    assert (min(steps), max(steps)) == (10, 50)
    assert {request["steps"] for request in requests("generate")} == {20}
    assert len({request["image"] for request in requests("classify")}) == 200


@pytest.mark.zoo
def test_a_static_batch_draws_the_pixels_of_the_service() -> None:
    """Rows of different length in one batch of work.py, against each alone as a worker's engine steps it."""
    import numpy as np

    from models.tasks.generator import load

    task = load(ZOO / "fashion-dit", 3, "cpu")
    works = [
        GenerateWork(
            model="fashion-dit", labels=(i,), seeds=(i,), steps=steps, solver="dpmpp_2m", guidance=2.0, gear="full"
        )
        for i, steps in enumerate((2, 4, 3))
    ]
    together = run(task, works)
    for work, row in zip(works, together, strict=True):
        for _ in range(task.admit(work, [0], [0])[0]):
            task.step([0])
        [alone] = task.collect([0])
        assert np.array_equal(row.pixels, alone.pixels)
        assert row.exit_depths == (8,) * work.steps


def closed(name: str, load: str, rate: float, p50: float = 10.0, **more: Any) -> dict[str, Any]:
    cell = {"work": "sleep", "contestant": name, "kind": "closed", "load": load, "answered_per_s": rate}
    rest = {"p50_ms": p50, "p99_ms": 2 * p50, "cpu_ms": 0.5, "rss": 90.0, "pss": 70.0, "failed": 0, "repeat": 0}
    return cell | rest | {"discarded": 0, "noisy": False} | more


def opened(name: str, load: str, good: float, **more: Any) -> dict[str, Any]:
    cell = closed(name, load, good, kind="open", goodput_per_s=good, offered_per_s=800.0, p95_ms=15.0)
    return cell | {"deadline_ms": 60.0} | more


CELLS = [
    {"kind": "head", "date": "2026-11-21", "machine": "2 cores", "commit": "abc", "versions": {"mosec": "0.9.8"}},
    *(closed(name, "1", 50, p50) for name, p50 in (("offramp", 20.0), ("mosec", 18.0), ("ray", 40.0))),
    closed("offramp", "32", 690), closed("mosec", "32", 700), closed("mosec", "128", 720), closed("ray", "32", 70),
    closed("mosec", "32", 9000, noisy=True, discarded=3, repeat=1),
    opened("offramp", "1.2", 600), opened("mosec", "1.2", 800), opened("mosec", "0.5", 400), opened("ray", "1.2", 0),
    {"work": "sleep", "contestant": "bentoml", "kind": "skip", "reason": "x\nno such wheel"},
    {"work": "sleep", "contestant": "mosec", "kind": "kill", "load": "0.5", "accepted": 100, "answered": 40,
     "refused": 7, "held": 9, "saved": 1, "back_s": None, "share": 0.4, "repeat": 0},
]  # fmt: skip

PEERS_OF_CLASSIFY = {"offramp cascade": 300, "mosec": 100, "ray": 50, "litserve": 60}


def test_capacity_is_the_best_peers_and_disturbed_cells_do_not_count() -> None:
    best, able = capacities(CELLS, "sleep")
    assert (best, able["offramp"], able["ray"]) == (720, 690, 70)
    assert len(of([closed("x", "1", 1, noisy=True)], contestant="x")) == 1  # better than nothing
    assert deadline_ms(CELLS, "sleep", 3.0) == 120.0
    assert deadline_ms(CELLS, "mixed", 3.0) is None


def test_a_lost_bar_is_said_as_plainly_as_a_won_one() -> None:
    assert best_goodput(CELLS, "sleep", "mosec") == 800
    field = [*CELLS, opened("ray", "own 0.9", 60), opened("litserve", "1.2", 50), opened("bentoml", "1.2", 40)]
    to_mosec, to_others, *unmeasured = bars(field)
    assert [bar["ratio"] for bar in unmeasured] == [None] * 3
    assert (to_mosec["rival"], to_mosec["ratio"], to_mosec["met"]) == ("mosec", 0.75, False)
    assert (to_others["rival"], to_others["ratio"], to_others["met"]) == ("ray", 10.0, True)
    assert [bar["met"] for bar in bars(CELLS)] == [False, None, None, None, None]
    few = [cell for cell in field if cell.get("contestant") not in ("mosec", "ray")]
    assert [bar["met"] for bar in bars(few)] == [None] * 5
    told = section(field)
    assert "- 20 ms model: Offramp at least 0.95x mosec: 0.75x [0.75, 0.75]. **Not met.**" in told
    assert "Left out: bentoml in (b) a model of 20 ms a batch of at most 16: no such wheel" in section(CELLS)
    assert "3 runs were discarded" in told
    assert "| mosec | 100 | 40 | 40.0 % | 1 of 9 | 7 | never |" in told
    assert "| mosec | **800** | **0.50** | **70.0** | **40.0 %** | never |" in readme(CELLS)
    assert "Left out: bentoml" in readme(CELLS)
    assert summary(CELLS)["works"]["sleep"]["mosec"]["closed 128"]["answered_per_s"] == 720


def test_a_rival_that_answers_all_it_is_offered_decides_nothing_for_us() -> None:
    """It might do more: a closed loop says how much at most."""
    field = [
        *(
            opened("offramp", "own 0.9", 600),
            opened("litserve", "0.8", 580, offered_per_s=580),
            opened("ray", "0.5", 9),
        ),
        *(opened("bentoml", "0.5", 9), closed("litserve", "32", 610), closed("offramp", "32", 700)),
        *(opened("offramp", "own 0.9", 500, repeat=1), opened("litserve", "0.8", 580, offered_per_s=580, repeat=1)),
        opened("offramp", "own 0.9", 700, repeat=2),
    ]
    [bar] = [bar for bar in bars(field) if bar["bar"] == 1.0]
    assert (bar["rival"], bar["met"], bar["at_most"]) == ("litserve", None, 610)
    assert bar["range"] == pytest.approx((500 / 580, 600 / 580))
    assert "**Not decided**: LitServe had no more to do there; its closed loop does 610 / s." in section(field)
    slower = [closed("litserve", "32", 590) if cell.get("load") == "32" else cell for cell in field]
    [bar] = [bar for bar in bars(slower) if bar["bar"] == 1.0]
    assert bar["met"] is True


def test_repeats_are_counted() -> None:
    told = section([*CELLS, closed("mosec", "32", 700, repeat=1)])
    assert "Repeats: closed loop 1 to 3, open loop 1, kill 1." in told


def test_who_is_not_there_is_said_and_asked_again_when_resumed() -> None:
    plan = Plan(["sleep", "noop"], ["mosec", "offramp"], Path("nowhere"))
    campaign = Campaign(plan, [], lambda cell: None, lambda text: None)
    for _ in range(2):
        campaign.leave_out({"mosec": "not installed"})
    assert [(c["work"], c["reason"]) for c in campaign.cells] == [("sleep", "not installed"), ("noop", "not installed")]
    assert "Left out: mosec in (b)" in section(campaign.cells)
    assert "Left out" not in section([campaign.cells[0], closed("mosec", "32", 700)])


def test_cells_are_kept_short_and_read_back_the_same(tmp_path: Path) -> None:
    assert [short(v) for v in (0.123456, 1234.5678, 720.0, 20480, None, True)] == [0.1235, 1235, 720, 20480, None, True]
    cell = opened("mosec", "0.8", 577.12345, foreign=0.0123456, statuses={"200": 4}, client_cores=0.1)
    few = kept(cell)
    assert (few["goodput_per_s"], few["foreign"], few["noisy"]) == (577.1, 0.01235, False)
    assert not {"statuses", "client_cores"} & set(few)
    assert kept(few) == few
    file = tmp_path / "cells"
    file.write_text("".join(map(line, [*CELLS, cell])))
    assert "".join(map(line, read(file))) == file.read_text()
    before, after = section([*CELLS, cell]), section(read(file))
    assert after == before.replace("577.12345", "577.1")


def test_a_kill_counts_on_a_busy_machine_too() -> None:
    quiet = next(cell for cell in CELLS if cell["kind"] == "kill")
    cells = [quiet, quiet | {"answered": 10, "noisy": True, "repeat": 1, "back_s": 2.5}]
    assert (back([quiet]), back(cells), back([])) == ((None, "never"), (2.5, "2.50 (not always)"), (None, ""))
    assert survived(cells, ["mosec"]) == (50, 200)
    assert "| mosec | 200 | 50 | 25.0 % |" in section([*CELLS[:-1], *cells])


def test_offramp_recovers_only_when_nothing_is_lost() -> None:
    [kill] = [cell for cell in CELLS if cell["kind"] == "kill"]
    assert recovery(CELLS)["met"] is None
    own = kill | {"contestant": "offramp", "answered": 100}
    assert recovery([*CELLS, own]) == {"answered": 100, "accepted": 100, "peers": {"mosec": (40, 100)}, "met": True}
    lost = recovery([*CELLS, own, own | {"contestant": "offramp full", "work": "generate", "answered": 99}])
    assert (lost["answered"], lost["accepted"], lost["met"]) == (199, 200, False)
    assert (percent(9999, 10000), percent(570, 1000), percent(0, 0)) == ("99.9 %", "57.0 %", "")
    assert "all that it accepted: 100 of 100. **Met.** (mosec 40.0 %)" in readme([*CELLS, own])


def test_a_cheaper_way_that_is_worse_meets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    field = [opened(name, "0.8", rate, work="classify") for name, rate in PEERS_OF_CLASSIFY.items()]
    [bar] = [bar for bar in bars(field) if bar["work"] == "classify"]
    assert (bar["ratio"], bar["met"], bar["worse"]) == (3.0, True, "")
    told = {"ensemble": ("91", "0.2600 ± 0.01", "0"), "cascade": ("91", "0.2653 ± 0.01", "0")}
    monkeypatch.setattr(quality, "methods", lambda: told)
    [bar] = [bar for bar in bars(field) if bar["work"] == "classify"]
    assert (bar["ratio"], bar["met"], bar["worse"]) == (3.0, False, "NLL 0.2653 against 0.2600")


def test_the_best_of_a_column_is_bold_whoever_has_it() -> None:
    assert bold([1.0, None, 3.0, 3.001], ["1", "", "3", "3"], max) == ["1", "", "**3**", "**3**"]
    assert bold([1.0, 3.0], ["1", "3"], min) == ["**1**", "3"]
    assert bold([None], [""], max) == [""]
    rows = [row.split(" | ") for row in readme(CELLS).splitlines() if row.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| Offramp, same work", "| BentoML", "| mosec", "| Ray Serve"]
    assert [row[1] for row in rows[2:]] == ["600", "", "**800**", "0"]


def test_a_page_is_filled_between_its_markers_and_only_there() -> None:
    page = f"before\n\n{START}\nold\n{END}\n\nafter\n<!-- end -->\n"
    once = filled(page, "| new \\1 |\n", "README.md")
    assert once == f"before\n\n{START}\n\n| new \\1 |\n\n{END}\n\nafter\n<!-- end -->\n"
    assert filled(once, "| new \\1 |\n", "README.md") == once
    for wrong in ("nothing", f"{END}\n{START}\n", page + page):
        with pytest.raises(ValueError, match=r"README\.md: put a line <!-- peers"):
            filled(wrong, "x", "README.md")


def test_plots_show_every_open_loop_by_offered_load() -> None:
    far = opened("mosec", "0.5", 400, offered_per_s=500.0)
    drawn = points([*CELLS[:-4], opened("mosec", "1.2", 300), far], "sleep")
    assert drawn["mosec"][0] == (500.0, 400)
    assert drawn["mosec"][-1] == (800.0, 550.0)
    assert set(stamps(CELLS)) == {"peers-sleep.png"}


def test_the_command_of_a_run_names_no_place() -> None:
    given = ["--long", "--out", "/somewhere/cells", "--venvs=/else", "--only", "sleep", "mosec", "--resume", "x"]
    assert command(given) == "python benchmarks/bench_peers.py --long --only sleep mosec"
    assert command([]) == "python benchmarks/bench_peers.py"


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    file = tmp_path / "cells"
    file.write_text("\n".join(map(json.dumps, CELLS)) + '\n{"work": "sle')
    assert read(file) == json.loads(json.dumps([*map(kept, CELLS)]))


def test_an_interrupted_run_goes_on_where_it_stopped() -> None:
    plan = Plan(("sleep",), ("mosec", "ray", "offramp"), Path("nowhere"))
    campaign = Campaign(plan, [*CELLS], say=lambda line: None)
    assert [campaign.order(repeat)[0] for repeat in range(4)] == ["mosec", "mosec", "offramp", "offramp"]
    assert all(sorted(campaign.order(repeat)) == ["mosec", "offramp", "ray"] for repeat in range(4))
    assert [*campaign.rates()] == ["0.5", "0.8", "1.2", "own 0.6", "own 0.9"]
    assert [campaign.due("sleep", name, "own 0.6") for name in ("mosec", "offramp", "ray")] == [False, False, True]
    assert campaign.due("sleep", "mosec", "own 0.9")
    campaign.turn("sleep", "ray", "closed", 0, {"1": 1.0, "32": 32.0}, 60.0)  # nothing to do, nothing is started
    assert len(campaign.cells) == len(CELLS)
    assert ("sleep", "offramp") in campaign.checked  # with a deadline there is no time to look at answers
    campaign.turn("sleep", "ray", "closed", 1, {"1": 1.0}, 60.0)
    assert campaign.cells[-1]["kind"] == "skip"
    assert "not installed" in campaign.cells[-1]["reason"]


def test_a_contestant_is_started_anew_behind_a_cell_that_left_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    answers = iter([LOST, OK, LOST])

    class Who:
        port, mark = 0, "nobody's"

        def wire(self, variant: str, deadline_s: float) -> list[str]:
            return []

        def start(self, timeout_s: float) -> None:
            done.append("start")

        def stop(self) -> None:
            done.append("stop")

    def client(port: int, plan: dict[str, Any]) -> dict[str, Any]:
        done.append(f"load {plan['rate']:g}")
        return {"seen": [(2.0, 0.1, next(answers))], "cpu_s": 0.0}

    monkeypatch.setattr("benchmarks.peers.campaign.load", client)
    plan = Plan(("sleep",), ("mosec",), Path("nowhere"), foreign=float("inf"))
    campaign = Campaign(plan, [*CELLS], say=lambda line: None)
    monkeypatch.setattr(campaign, "started", lambda work, name, timeout_s: Who())
    campaign.turn("sleep", "mosec", "open", 9, {"0.5": 0.5, "0.8": 0.8, "1.2": 1.2}, 0.15)
    best, _ = capacities(CELLS, "sleep")
    loads = [f"load {share * best:g}" for share in (0.5, 0.8, 1.2)]
    assert done == [loads[0], "stop", "start", loads[1], loads[2], "stop"]


def test_pins_name_versions_and_environments_are_known_by_them(tmp_path: Path) -> None:
    for name in (*venvs.PEERS, "fastapi"):
        assert all("==" in line for line in venvs.pins(name).splitlines())
        assert "torch==2.13.0" in venvs.pins(name)
    (tmp_path / "mosec").mkdir()
    (tmp_path / "mosec" / venvs.DONE).write_text("mosec==0.0.1\n")
    assert venvs.python(tmp_path, "mosec") is None
    with pytest.raises(RuntimeError, match="not installed"):
        contestant("mosec", "sleep", tmp_path)


def test_quality_is_quoted_from_the_cards() -> None:
    assert cited("classify").count("NLL 0.2") == 3
    assert "`full` Frechet 0.2" in cited("mixed")
    assert cited("sleep") == ""


def test_the_client_knows_where_an_answer_ends() -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n"
    for whole in (plain, chunked):
        assert [body_of(whole[:n]) for n in range(len(whole))] == [None] * len(whole)
        assert body_of(whole) == b"hello"
    with pytest.raises(ValueError, match="without an end"):
        body_of(b"HTTP/1.1 200 OK\r\n\r\nhello")


async def test_the_client_keeps_what_was_lost_and_what_was_not_taken() -> None:
    """A server that answers its first request, hangs at the second, and closes the third connection."""
    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        served.append(asyncio.current_task())
        if len(served) == 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if len(served) < 3:
            await reader.read()  # until the client has gone
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    plan = {"port": port, "requests": ["GET / HTTP/1.1\r\n\r\n"], "seconds": 0.0, "patience_s": 0.3}
    found = await asyncio.to_thread(load, port, plan | {"connections": 3})
    assert sorted(status for *_, status in found["seen"]) == [0, 0, 200]
    server.close()
    await server.wait_closed()
    await asyncio.gather(*(task for task in served if task))
    gone = await asyncio.to_thread(load, port, plan | {"rate": 100.0, "seconds": 0.2})
    assert {status for *_, status in gone["seen"]} == {-1}
