"""The models that ship: they load, their cards and the README hold the measured numbers, the bars hold."""

from pathlib import Path

import pytest

from models.store import ZOO, StoreError, read_config, read_json
from models.tasks.classify import load as load_classifier
from models.tasks.gears import read_gears, write_gears
from models.tasks.generator import load as load_generator

pytestmark = pytest.mark.zoo
REPO = Path(__file__).parents[2]


def gears():
    return {gear["name"]: gear for gear in read_json(ZOO / "fashion-dit" / "gears.json")["gears"]}


def test_every_shipped_folder_loads():
    generator, classifier = (
        load_generator(ZOO / "fashion-dit", 2, "cpu"),
        load_classifier(ZOO / "fashion-ensemble", 2, "cpu"),
    )
    assert [gear.name for gear in generator.info.gears] == ["full", "balanced", "eco"]
    assert generator.info.default_gear == "balanced"
    assert set(classifier.info.methods) == {"single", "bridge", "ensemble", "cascade"}
    assert set(classifier.info.decisions) == set(classifier.info.sets) == set(classifier.info.methods)
    assert classifier.info.methods["bridge"] <= 1.25


def test_measured_gears_meet_their_bars():
    found = gears()
    full, balanced, eco = found["full"], found["balanced"], found["eco"]
    assert full["class_accuracy"] >= 0.93
    assert full["class_accuracy"] - balanced["class_accuracy"] <= 0.015
    assert balanced["layer_evals_ratio"] <= 0.80
    assert balanced["time_ratio"]["value"] <= 1 / 1.15
    assert balanced["frechet"]["value"] <= 1.25 * full["frechet"]["value"]
    assert eco["layer_evals_ratio"] <= 0.65


@pytest.mark.parametrize("page", [ZOO / "fashion-dit" / "card.md", REPO / "README.md"])
def test_gears_in_prose_are_those_of_gears_json(page):
    text = page.read_text()
    for name, gear in gears().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{1 - gear['layer_evals_ratio']:.1%}" in row
        assert f"{gear['class_accuracy']:.1%}" in row
        assert f"{gear['frechet']['value']:.3f}" in row


def test_the_readme_holds_the_table_of_the_ensembles_card():
    card, readme = (ZOO / "fashion-ensemble" / "card.md").read_text(), (REPO / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith(("| source", "| DE-", "| bridge", "| regressor"))]
    assert len(rows) == 10
    assert [row for row in rows if row not in readme] == []


def test_the_receipts_time_is_the_cards():
    times = read_config(ZOO / "fashion-ensemble")["times"]
    row = next(
        line
        for line in (ZOO / "fashion-ensemble" / "card.md").read_text().splitlines()
        if line.startswith("| bridge x1")
    )
    assert float(row.split("|")[-2]) == times["bridge"]


def test_malformed_gears_are_named(tmp_path):
    write_gears(tmp_path, list(gears().values()), "none-such")
    with pytest.raises(StoreError, match="a default among"):
        read_gears(tmp_path)
    broken = gears()
    del broken["eco"]["steps"]
    write_gears(tmp_path, list(broken.values()), "balanced")
    with pytest.raises(StoreError, match="eco"):
        read_gears(tmp_path)
