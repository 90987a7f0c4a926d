"""The tables of a file of cells, and the pages that hold them.

    python -m benchmarks.peers.report FILE            print the section for RESULTS.md and the table for the README
    python -m benchmarks.peers.report FILE --write    keep the cells as benchmarks/results/peers.jsonl, short, and make
                                                      all that is said of them: both pages and the plots

FILE is benchmarks/results/peers.jsonl where none is given. A number is the median over repeats.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.peers.cells import (
    WORKS,
    Cells,
    best_goodput,
    busy,
    capacities,
    contestants,
    every,
    line,
    middle,
    read,
    survived,
)
from benchmarks.peers.tables import (
    GONE,
    PLAIN,
    Number,
    back,
    grid,
    left_out,
    lines_of,
    percent,
    promises,
    section,
    source,
    text,
    where,
)

REPO = Path(__file__).resolve().parent.parent.parent
FILE, IMAGES = Path("benchmarks/results/peers.jsonl"), Path("docs/images")
RESULTS = "benchmarks/RESULTS.md"
LEGEND = (
    "By work, right answers per second within one deadline for all, at the best of the loads tried (no model: answers "
    "per second); CPU of all processes and memory (PSS) with the 20 ms model at {busy} connections; "
    "share of accepted requests answered when the worker gets SIGKILL, and the time until new ones are. Best in bold. "
    "Same work: gear `full`, method `ensemble`. Early exits: gear `balanced`, method `cascade`. Bridge: `bridge`. "
    "{gone}"
)
COMMAND = "python -m benchmarks.peers.report --write"
START, END = f"<!-- peers: {COMMAND} -->", "<!-- end -->"


def bold(column: Sequence[Number], shown: Sequence[str], best: Callable[..., float]) -> list[str]:
    """A column with its best number in bold, and whatever reads the same."""
    there = [number for number in column if number is not None]
    top = shown[list(column).index(best(there))] if there else None
    return [f"**{cell}**" if cell and cell == top else cell for cell in shown]


def throughput(cells: Cells, work: str, name: str) -> Number:
    """Answers in time, or of a work without open loop just answers, per second."""
    if every(cells, work=work, kind="open"):
        return best_goodput(cells, work, name)
    return capacities(cells, work)[1].get(name)


def readme(cells: Cells) -> str:
    """The short table: throughput by work, CPU and memory, what a crash costs; then the bars and where it is from."""
    rows = lines_of(cells)

    def column(number: Callable[[str], Number], best: Callable[..., float], form: Callable[[Number], str]) -> list[str]:
        column = [next((n for n in map(number, asked) if n is not None), None) for asked in rows.values()]
        return bold(column, [form(number) for number in column], best)

    def spent(key: str) -> Callable[[str], Number]:
        at = busy(cells, "sleep")
        return lambda name: middle(cells, key, work="sleep", kind="closed", contestant=name, load=at)

    works = [work for work in WORKS if contestants(cells, work)]
    columns = [column(partial(throughput, cells, work), max, text) for work in works]
    columns += [column(spent("cpu_ms"), min, text), column(spent("pss"), min, text)]
    crash = [survived(cells, asked) for asked in rows.values()]
    shares = [done / taken if taken else None for done, taken in crash]
    columns.append(bold(shares, [percent(*run) for run in crash], max))
    kills = every(cells, kind="kill")
    again = [back([cell for cell in kills if cell["contestant"] in asked]) for asked in rows.values()]
    columns.append(bold([seconds for seconds, _ in again], [told for _, told in again], min))
    header = [
        "",
        *(PLAIN[work] for work in works),
        "CPU-ms / request",
        "memory MiB",
        "killed: answered",
        "back after s",
    ]
    table = grid(header, zip(rows, *columns, strict=True))
    parts = [table, LEGEND.format(busy=busy(cells, "sleep"), gone=GONE), *left_out(cells), "What was promised:"]
    parts += [promises(cells), f"{where(cells)}; {source(cells)}. [Every load, latencies, plots]({RESULTS})."]
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[Cells], str]] = {
    "README.md": readme,
    RESULTS: partial(section, pictures="../docs/images"),
}


def filled(page: str, body: str, name: str) -> str:
    """The page with `body` between its markers; ValueError when it does not have them once each, in order."""
    between = re.compile(f"{re.escape(START)}\n.*?{re.escape(END)}", re.DOTALL)
    if page.count(START) != 1 or not between.search(page):
        raise ValueError(f"{name}: put a line {START} and below it a line {END} where the comparison goes, once")
    return between.sub(lambda _: f"{START}\n\n{body}\n{END}", page)


def write(cells: Cells, repo: Path = REPO) -> list[Path]:
    """Keep the cells, and make both pages and the plots; the files written."""
    from benchmarks.peers.plots import plots

    pages = {repo / name: filled((repo / name).read_text(), make(cells), name) for name, make in PAGES.items()}
    (repo / FILE).parent.mkdir(parents=True, exist_ok=True)
    (repo / FILE).write_text("".join(map(line, cells)))
    for page, said in pages.items():
        page.write_text(said)
    return [repo / FILE, *pages, *plots(cells, repo / IMAGES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=REPO / FILE)
    parser.add_argument("--write", action="store_true", help="keep the cells, write pages and plots")
    chosen = parser.parse_args()
    cells = read(chosen.file)
    if chosen.write:
        print("\n".join(str(file.relative_to(REPO)) for file in write(cells)))
    else:
        print(section(cells), readme(cells), sep="\n")


if __name__ == "__main__":
    main()
