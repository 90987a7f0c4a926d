from __future__ import annotations

from dataclasses import replace

import pytest

from models.api import (
    CascadePoint,
    ClassifyParams,
    ClassifyWork,
    DecisionRule,
    ExitSchedule,
    Gear,
    GenerateParams,
    ModelInfo,
    SetRule,
)
from service.errors import BadRequest, OfframpError, UnknownName
from service.gateway.ladder import gears_for, methods_for
from service.gateway.resolve import classify_work, generate_work
from service.ladders import moved, rung_at, rungs_of, units


def gear(name: str, *depths: int, accuracy: float | None = None, **changes: object) -> Gear:
    edges = tuple((i + 1) / len(depths) for i in range(len(depths)))
    return replace(Gear(name, ExitSchedule(edges, depths), "ddim", 10, 2.0, class_accuracy=accuracy), **changes)


FULL, GOOD, LOW = gear("full", 8, accuracy=0.96), gear("good", 8, 6, accuracy=0.95), gear("low", 4, 4, accuracy=0.9)
RULE = DecisionRule("entropy", 0.6, None, "coverage_at_risk", 0.05, 0.95, 0.85, 0.04, 0.05)
DRAWER = ModelInfo(
    "drawer", "generate", ("a", "b"), (28, 28, 1), "w", depth=8, gears=(LOW, FULL, GOOD), default_gear="low"
)
JUDGE = ModelInfo(
    "judge", "classify", ("a", "b"), (1, 1, 1), "w",
    methods={"single": 1.0, "bridge": 1.2, "cascade": 1.5, "ensemble": 5.0, "exits": 0.5},
    times={"single": 1.0, "bridge": 1.3, "cascade": 1.8, "ensemble": 5.0},
    sets={"bridge": SetRule("raps", 5000, 0.01), "ensemble": SetRule("raps", 5000, 0.01)},
    cascade=(CascadePoint(0.0, 1.2, RULE), CascadePoint(0.1, 1.5, RULE), CascadePoint(0.3, 2.5, RULE)),
)  # fmt: skip


def test_gears_go_from_the_best_to_the_cheapest() -> None:
    assert rungs_of(DRAWER) == ("full", "good", "low")


@pytest.mark.parametrize(
    "other",
    [
        gear("odd", 8, 2, 8, 2),
        gear("guided", 2, guidance=3.0),
        gear("short", 2, steps=5),
        gear("other", 2, solver="euler"),
    ],
    ids=lambda gear: gear.name,
)
def test_a_gear_that_a_running_row_could_not_change_to_is_no_rung(other: Gear) -> None:
    """Its exits are not below those of the rung before, or its trajectory is another."""
    assert rungs_of(replace(DRAWER, gears=(FULL, GOOD, other))) == ("full", "good")


def test_methods_give_the_ensemble_to_all_then_to_fewer_and_fewer_flagged_images() -> None:
    rungs = ("ensemble", "cascade@2.5", "cascade@1.5", "cascade@1.2", "bridge", "single")
    assert rungs_of(JUDGE) == rungs
    assert rungs_of(replace(JUDGE, methods={"single": 1.0, "bridges": 1.3})) == ("single",)


@pytest.mark.parametrize("cost", [0.48154, 1.38449999, 2.0, 12.34567, 123.45678])
def test_a_rung_of_a_cascade_pays_for_its_point(cost: float) -> None:
    info = replace(JUDGE, methods={"cascade": 1.5}, cascade=(CascadePoint(0.1, cost, RULE),))
    [rung] = rungs_of(info)
    work = moved(ClassifyWork(model="judge", images=(b"x",), method="cascade", top_k=1), rung)
    assert work.max_cost is not None
    assert cost <= work.max_cost < cost + 2e-4


@pytest.mark.parametrize(
    ("asked", "ladder"),
    [
        ({}, ("full", "good", "low")),
        ({"floor": "good"}, ("full", "good")),
        ({"floor": "full"}, ("full",)),
        ({"floor": 0.95}, ("full", "good")),
        ({"floor": 0.0}, ("full", "good", "low")),
        ({"max_compute": 0.9}, ("good", "low")),
        ({"max_compute": 0.9, "floor": "good"}, ("good",)),
        ({"gear": "low"}, ()),
    ],
)
def test_a_request_says_what_may_be_chosen(asked: dict[str, object], ladder: tuple[str, ...]) -> None:
    params = GenerateParams(**asked)
    assert gears_for(params, DRAWER) == ladder
    work = generate_work(params, DRAWER, "png")
    assert (work.ladder, work.gear) == (ladder, ladder[0] if ladder else "low")


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"gear": "low", "floor": "full"}, "floor", "named gear"),
        ({"gear": "low", "max_compute": 0.5}, "max_compute", "named gear"),
        ({"floor": "best"}, "floor", "full, good, low"),
        ({"floor": 0.97}, "floor", "the best has 0.96"),
        ({"floor": 0.95, "max_compute": 0.6}, "floor", "the best has 0.9"),
        ({"floor": "full", "max_compute": 0.6}, "floor", "max_compute"),
        ({"max_compute": 0.3}, "max_compute", "at least 0.5"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_field(asked: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(OfframpError, match=says) as caught:
        gears_for(GenerateParams(**asked), DRAWER)
    assert caught.value.field == field


def test_without_a_floor_the_default_gear_is_it() -> None:
    info = replace(DRAWER, default_gear="good")
    assert gears_for(GenerateParams(), info) == ("full", "good")
    assert gears_for(GenerateParams(floor="low"), info) == ("full", "good", "low")
    assert gears_for(GenerateParams(max_compute=0.6), info) == ("low",)


def test_a_gear_that_was_never_measured_has_no_accuracy_to_promise() -> None:
    with pytest.raises(BadRequest, match="class accuracy"):
        gears_for(GenerateParams(floor=0.5), replace(DRAWER, gears=(gear("full", 8),)))


def test_methods_stop_at_their_floor() -> None:
    assert methods_for(ClassifyParams(), JUDGE) == ()
    assert methods_for(ClassifyParams(method="auto"), JUDGE) == rungs_of(JUDGE)
    assert methods_for(ClassifyParams(method="auto", floor="cascade"), JUDGE) == rungs_of(JUDGE)[:4]
    assert methods_for(ClassifyParams(method="auto", floor="ensemble"), JUDGE) == ("ensemble",)


def test_sets_are_promised_by_calibrated_methods_alone() -> None:
    assert methods_for(ClassifyParams(method="auto", alpha=0.1), JUDGE) == ("ensemble", "bridge")
    with pytest.raises(BadRequest, match="no calibrated"):
        methods_for(ClassifyParams(method="auto", alpha=0.1), replace(JUDGE, sets={}))


@pytest.mark.parametrize(
    ("asked", "field", "kind"),
    [
        ({"floor": "single"}, "floor", BadRequest),
        ({"method": "bridge", "floor": "single"}, "floor", BadRequest),
        ({"method": "auto", "purify": 1}, "purify", BadRequest),
        ({"method": "auto", "max_cost": 2.0}, "max_cost", BadRequest),
        ({"method": "auto", "floor": "exits"}, "floor", UnknownName),
    ],
)
def test_options_that_auto_does_not_have_are_refused(
    asked: dict[str, object], field: str, kind: type[OfframpError]
) -> None:
    with pytest.raises(kind) as caught:
        methods_for(ClassifyParams(**asked), JUDGE)
    assert caught.value.field == field


def test_auto_classification_is_priced_as_the_best_and_moves() -> None:
    work = classify_work(ClassifyParams(method="auto"), JUDGE, [b"x"])
    assert (work.method, work.max_cost) == ("ensemble", None)
    there = moved(work, "cascade@1.5")
    assert (there.method, there.max_cost, there.images) == ("cascade", 1.5, (b"x",))
    assert moved(there, "single").max_cost is None


@pytest.mark.parametrize(
    ("ladder", "level", "rung"),
    [
        (("full", "good", "low"), 0, "full"),
        (("full", "good", "low"), 2, "low"),
        (("full", "good"), 2, "good"),
        (("full", "low"), 1, "low"),
        (("good", "low"), 0, "good"),
        (("full",), 2, "full"),
        (("full", "gone"), 2, "full"),
        (("gone",), 1, "gone"),
    ],
)
def test_work_is_where_its_model_is_or_as_near_above_as_it_may(ladder: tuple[str, ...], level: int, rung: str) -> None:
    assert rung_at(ladder, rungs_of(DRAWER), level) == rung


def test_units_are_blocks_of_each_evaluation_or_the_time_of_a_method() -> None:
    work = generate_work(GenerateParams(gear="good", steps=4), DRAWER, "png")
    assert units(work, DRAWER) == [12.0, 12.0, 12.0, 16.0]
    work = ClassifyWork(model="judge", images=(b"x",), method="cascade", top_k=1)
    assert units(work, JUDGE) == [1.8]
    assert units(replace(work, max_cost=2.5), JUDGE) == [pytest.approx(1.8 * 2.5 / 1.5)]
    assert units(replace(work, method="exits"), JUDGE) == [0.5], "cost, where no time was measured"
