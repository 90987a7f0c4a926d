"""The models that ship: they load, their cards and the README hold the measured numbers, the bars hold."""

from pathlib import Path

import pytest

from models.registry import METHODS
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
    assert set(classifier.info.methods) == set(METHODS)
    assert set(classifier.info.decisions) == set(classifier.info.sets) == set(classifier.info.methods)
    assert classifier.info.methods["bridge"] <= 1.25
    purifier = classifier.info.purifier
    assert (purifier.model, purifier.u, purifier.steps, purifier.gear) == ("fashion-dit", 0.3, 1, "full")
    assert {"single", "bridge", "ensemble"} <= set(purifier.methods) <= set(classifier.info.methods) - {"cascade"}


def test_measured_gears_meet_their_bars():
    found = gears()
    full, balanced, eco = found["full"], found["balanced"], found["eco"]
    assert full["class_accuracy"] >= 0.93
    assert full["class_accuracy"] - balanced["class_accuracy"] <= 0.015
    assert balanced["layer_evals_ratio"] <= 0.72
    assert balanced["time_ratio"]["value"] <= 1 / 1.25
    assert balanced["frechet"]["value"] <= 1.10 * full["frechet"]["value"]
    assert eco["layer_evals_ratio"] <= 0.62
    assert eco["time_ratio"]["value"] <= 1 / 1.5


@pytest.mark.parametrize("page", [ZOO / "fashion-dit" / "card.md", REPO / "README.md"])
def test_gears_in_prose_are_those_of_gears_json(page):
    text = page.read_text()
    for name, gear in gears().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{1 - gear['layer_evals_ratio']:.1%}" in row
        assert f"{gear['class_accuracy']:.1%}" in row
        assert f"{gear['frechet']['value']:.3f}" in row


def served_rows(text):
    """Cells of the first table of served methods, by method."""
    lines = text.split("| method | accuracy |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[1].strip(" `"): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_the_readme_holds_the_served_methods_of_the_ensembles_card():
    rows = served_rows((ZOO / "fashion-ensemble" / "card.md").read_text())
    assert set(rows) == set(load_classifier(ZOO / "fashion-ensemble", 1, "cpu").info.methods)
    assert served_rows((REPO / "README.md").read_text()) == rows


def test_the_receipts_times_are_the_cards():
    times, rows = (
        read_config(ZOO / "fashion-ensemble")["times"],
        served_rows((ZOO / "fashion-ensemble" / "card.md").read_text()),
    )
    assert {method: float(row[6]) for method, row in rows.items()} == times


def test_the_cards_promises_are_those_that_are_served():
    info, card = load_classifier(ZOO / "fashion-ensemble", 1, "cpu").info, (ZOO / "fashion-ensemble" / "card.md")
    decisions = card.read_text().split("### Decisions")[1].split("###")[0]
    for method, rule in info.decisions.items():
        row = next(line for line in decisions.splitlines() if line.startswith(f"| {method} |"))
        assert f"| {rule.accept:.3f} | {rule.abstain:.3f} | {rule.coverage:.1%} | {rule.bound:.2%} |" in row
    for point in info.cascade:
        assert f"| {point.cost:.2f}" in card.read_text()


def coverages():
    """(served, alpha, covered by the shipped calibration, covered over 20 splits) from the card."""
    table = (ZOO / "fashion-ensemble" / "card.md").read_text().split("### Prediction sets")[1].split("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return [(r[0], float(r[1]), *(float(r[i].split("%")[0]) / 100 for i in (2, 5))) for r in rows[2:]]


def test_prediction_sets_meet_their_bar():
    assert len(coverages()) == 2 * len(served_rows((ZOO / "fashion-ensemble" / "card.md").read_text()))
    for served, alpha, shipped, splits in coverages():
        assert abs(splits - (1 - alpha)) <= 0.01, served
        assert abs(shipped - (1 - alpha)) <= 0.015, served  # one draw of calibration and test rows


def test_malformed_gears_are_named(tmp_path):
    write_gears(tmp_path, list(gears().values()), "none-such")
    with pytest.raises(StoreError, match="a default among"):
        read_gears(tmp_path)
    broken = gears()
    del broken["eco"]["steps"]
    write_gears(tmp_path, list(broken.values()), "balanced")
    with pytest.raises(StoreError, match="eco"):
        read_gears(tmp_path)
