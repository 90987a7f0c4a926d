"""Docs that are tested: tables equal the code they describe, links and verbs exist, examples fit the schemas.

`python -m tests.test_docs` writes the tables anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from benchmarks.peers import cells, plots, report
from models.api import ClassifyParams, GenerateParams, SolverOptions
from service import errors
from service.config import Settings
from service.gateway import schemas
from tests.support import REPO
from tests.traffic import Traffic

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
SUFFIX = {"counter": "_total", "info": "_info"}


def table(head: str, rows: list[list[str]]) -> str:
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def shown(value: Any) -> str:
    return "" if value in ("", None) else f"`{value}`"


def settings() -> str:
    fields = Settings.model_fields.items()
    rows = [[f"`OFFRAMP_{name.upper()}`", shown(field.default), str(field.description)] for name, field in fields]
    return table("variable | default | meaning", rows)


def series(registry: CollectorRegistry) -> str:
    rows = []
    for family in sorted(registry.collect(), key=lambda family: family.name):
        keys = dict.fromkeys(key for sample in family.samples for key in sample.labels if key != "le")
        labels = ", ".join(f"`{key}`" for key in keys)
        rows.append([f"`{family.name}{SUFFIX.get(family.type, '')}`", family.type, labels, family.documentation])
    return table("name | type | labels | meaning", rows)


def json_type(hint: Any) -> str:
    """`int | None` is an integer that may be absent; a Literal lists its values."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return "list of " + ", ".join(json_type(member) for member in get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "object"
    if members := [member for member in get_args(hint) if member is not type(None)]:
        return " or ".join(json_type(member) for member in members)
    return {int: "integer", float: "number", str: "string", bool: "boolean"}[hint]


def request_fields(params: type[Any]) -> str:
    rows, hints = [], get_type_hints(params)
    for field in dataclasses.fields(params):
        bounds = field.metadata
        limits = [f"{sign} {bounds[key]}" for key, sign in SIGNS.items() if key in bounds]
        limits += [f"at most {bounds['max_length']} characters"] if "max_length" in bounds else []
        kind = json_type(hints[field.name])
        rows.append([f"`{field.name}`", kind, shown(field.default), ", ".join(limits), bounds["doc"]])
    return table("field | type | default | bounds | meaning", rows)


def meanings() -> dict[str, str]:
    """Code to meaning, from the tree at the top of errors.py."""
    return dict(re.findall(r"^.* \d{3} (\w+) +(.+)$", str(errors.__doc__), re.M))


def problems() -> str:
    meaning = meanings()
    kinds = sorted(errors.by_code().values(), key=lambda kind: (kind.status, kind.code))
    rows = [[str(k.status), f"`{k.code}`", "yes" if k.retryable else "no", meaning.get(k.code, "")] for k in kinds]
    return table("status | code | retryable | meaning", rows)


def tables() -> dict[str, str]:
    """Every table that is made from code, by the name in its marker."""
    traffic = Traffic()
    traffic.round()
    return {
        "settings": settings(),
        "gateway series": series(traffic.gateway.registry),
        "worker series": series(traffic.worker.registry),
        "generate fields": request_fields(GenerateParams),
        "solver options": request_fields(SolverOptions),
        "classify fields": request_fields(ClassifyParams),
        "errors": problems(),
    }


def marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {re.escape(name)} -->\n\n)((?:\|.*\n)*)(\n?<!-- end -->)")


def code_of(page: Path) -> Iterator[str]:
    """Fenced blocks and inline code."""
    text = page.read_text()
    yield from (match[2] for match in FENCE.finditer(text))
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("name", tables())
def test_table_equals_the_code(name: str) -> None:
    found = [match[2] for page in PAGES for match in marked(name).finditer(page.read_text())]
    assert found == [tables()[name]], f"run: python -m tests.test_docs (table {name!r})"


@pytest.mark.parametrize("name", report.PAGES)
def test_comparison_with_peers_is_what_its_cells_give(name: str) -> None:
    page, measured = (REPO / name).read_text(), cells.read(REPO / report.FILE)
    assert page == report.filled(page, report.PAGES[name](measured), name), f"run: {report.COMMAND}"


def test_plots_of_peers_show_their_cells() -> None:
    measured, shown = cells.read(REPO / report.FILE), {}
    for file in (REPO / report.IMAGES).glob("peers-*.png"):
        with Image.open(file) as picture:
            shown[file.name] = picture.text[plots.KEY]
    assert shown == plots.stamps(measured), f"run: {report.COMMAND}"


def test_cells_of_peers_are_kept_short() -> None:
    text = (REPO / report.FILE).read_text()
    assert text == "".join(map(cells.line, cells.read(REPO / report.FILE))), f"run: {report.COMMAND}"
    assert len(text) < 400_000


def test_error_tree_names_every_code() -> None:
    assert set(meanings()) == set(errors.by_code())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    files = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in files if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_make_verbs_exist(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.M))
    used = {verb for code in code_of(page) for verb in re.findall(r"\bmake ([a-z]+)\b", code)}
    assert used <= verbs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_json_examples_fit_their_schema(page: Path) -> None:
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == "json":
            example = json.loads(match[2])
            if schema := re.search(r"<!-- schema: (\w+) -->\n\Z", text[: match.start()]):
                getattr(schemas, schema[1]).model_validate(example)


def test_api_examples_name_their_schema() -> None:
    text = (REPO / "docs" / "api.md").read_text()
    named = set(re.findall(r"<!-- schema: (\w+) -->\n```json", text))
    assert {"GenerateRequest", "GenerateResponse", "ClassifyRequest", "ClassifyResponse", "Problem"} <= named


def test_mentioned_settings_exist() -> None:
    known = {f"OFFRAMP_{name.upper()}" for name in Settings.model_fields}
    files = [*PAGES, REPO / "docker-compose.yml", REPO / "Dockerfile", *(REPO / "deploy").rglob("*.yml")]
    mentioned = {name for file in files for name in re.findall(r"\bOFFRAMP_[A-Z_]+\b", file.read_text())}
    assert mentioned <= known
    assert {"OFFRAMP_REDIS_URL", "OFFRAMP_WORKER_HOST"} <= mentioned


def write() -> None:
    """Put every table into the page that has its marker."""
    for page in PAGES:
        before = text = page.read_text()
        for name, body in tables().items():
            if match := marked(name).search(text):
                text = text[: match.start(2)] + body + "\n" + match[3].lstrip() + text[match.end() :]
        if text != before:
            page.write_text(text)
            print(f"wrote {page.relative_to(REPO)}")


if __name__ == "__main__":
    write()
