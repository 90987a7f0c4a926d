from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

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
from models.store import ZOO
from models.tasks.classify import load
from service.errors import BadRequest, OfframpError, UnknownName
from service.gateway.ladder import methods_for
from service.gateway.resolve import classify_work, generate_work
from service.ladders import method_time, moved, rung_at, rungs_of, units


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
    sets={"single": SetRule("raps", 5000, 0.01), "ensemble": SetRule("raps", 5000, 0.01)},
    cascade=(CascadePoint(0.0, 1.20004, RULE), CascadePoint(0.1, 1.5, RULE), CascadePoint(0.3, 2.5, RULE)),
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
    assert rungs_of(JUDGE) == ("ensemble", "cascade@2.5000", "cascade@1.5000", "cascade@1.2001", "single")
    assert rungs_of(replace(JUDGE, cascade=(), methods={"single": 1.0, "bridge": 1.3, "ensemble": 5.0})) == (
        "ensemble", "bridge", "single"
    )  # fmt: skip
    assert rungs_of(replace(JUDGE, methods={"single": 1.0, "bridges": 1.3})) == ("single",)


@pytest.mark.parametrize("cost", [0.48154, 1.38449999, 2.0, 12.34567, 123.45678])
def test_a_rung_of_a_cascade_pays_for_its_point(cost: float) -> None:
    info = replace(JUDGE, methods={"cascade": 1.5}, cascade=(CascadePoint(0.1, cost, RULE),))
    [rung] = rungs_of(info)
    work = moved(ClassifyWork(model="judge", images=(b"x",), method="cascade", top_k=1), rung)
    assert work.max_cost is not None
    assert cost <= work.max_cost < cost + 2e-4


def test_each_rung_is_cheaper_than_the_one_before() -> None:
    times = [method_time(rung, JUDGE) for rung in rungs_of(JUDGE)]
    assert all(b <= 0.85 * a for a, b in pairwise(times))


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
    work = generate_work(GenerateParams(**asked), DRAWER, "png")
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
        ({"floor": 0.9, "steps": 3}, "floor", "other steps"),
        ({"floor": 0, "steps": 3}, "floor", "other steps"),
        ({"floor": 0.9, "guidance": 7.5, "solver": "ddpm"}, "floor", "other solver and guidance"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_field(asked: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(OfframpError, match=says) as caught:
        generate_work(GenerateParams(**asked), DRAWER, "png")
    assert caught.value.field == field


def test_without_a_floor_the_default_gear_is_it() -> None:
    info = replace(DRAWER, default_gear="good")
    assert generate_work(GenerateParams(), info, "png").ladder == ("full", "good")
    assert generate_work(GenerateParams(floor="low"), info, "png").ladder == ("full", "good", "low")
    assert generate_work(GenerateParams(max_compute=0.6), info, "png").ladder == ("low",)


def test_gears_of_another_trajectory_than_the_default_are_no_rungs_even_if_dearer() -> None:
    long = gear("long", 8, 8, steps=50)
    assert rungs_of(replace(DRAWER, gears=(long, FULL, GOOD), default_gear="good")) == ("full", "good")


def test_a_gear_that_was_never_measured_has_no_accuracy_to_promise() -> None:
    with pytest.raises(BadRequest, match="class accuracy"):
        generate_work(GenerateParams(floor=0.5), replace(DRAWER, gears=(gear("full", 8),)), "png")


def test_a_gear_below_a_numeric_floor_is_left_out_wherever_it_stands() -> None:
    info = replace(DRAWER, gears=(FULL, replace(GOOD, class_accuracy=0.93), replace(LOW, class_accuracy=0.95)))
    assert generate_work(GenerateParams(floor=0.95), info, "png").ladder == ("full", "low")


def test_compute_is_that_of_the_steps_and_guidance_asked_for() -> None:
    """Guided near the data only, a gear that is shallow near the noise saves less."""
    at = {"guidance_interval": (0.0, 0.5)}
    with pytest.raises(BadRequest, match=r"at least 0\.89"):
        generate_work(GenerateParams(max_compute=0.88, floor="good", **at), replace(DRAWER, gears=(GOOD,)), "png")
    assert generate_work(GenerateParams(max_compute=0.88), DRAWER, "png").ladder == ("good", "low")


def test_methods_stop_at_their_floor() -> None:
    assert methods_for(ClassifyParams(), JUDGE) == ()
    assert methods_for(ClassifyParams(method="auto"), JUDGE) == rungs_of(JUDGE)
    assert methods_for(ClassifyParams(method="auto", floor="cascade"), JUDGE) == rungs_of(JUDGE)[:2]
    assert methods_for(ClassifyParams(method="auto", floor="single"), JUDGE) == rungs_of(JUDGE)
    assert methods_for(ClassifyParams(method="auto", floor="ensemble"), JUDGE) == ("ensemble",)


def test_sets_are_promised_by_calibrated_methods_alone() -> None:
    assert methods_for(ClassifyParams(method="auto", alpha=0.1), JUDGE) == ("ensemble", "single")
    with pytest.raises(BadRequest, match="no calibrated"):
        methods_for(ClassifyParams(method="auto", alpha=0.1), replace(JUDGE, sets={}))


@pytest.mark.parametrize(
    ("asked", "field", "kind"),
    [
        ({"floor": "single"}, "floor", BadRequest),
        ({"method": "bridge", "floor": "single"}, "floor", BadRequest),
        ({"method": "auto", "purify": 1}, "purify", BadRequest),
        ({"method": "auto", "max_cost": 2.0}, "max_cost", BadRequest),
        ({"method": "auto", "floor": "distilled"}, "floor", UnknownName),
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
    assert units(replace(work, gear="gone"), DRAWER) == []
    work = ClassifyWork(model="judge", images=(b"x",), method="cascade", top_k=1)
    assert units(work, JUDGE) == [1.8]
    assert units(replace(work, max_cost=2.5), JUDGE) == [pytest.approx(1.20004 + 0.3 * 5.0)]
    assert units(replace(work, method="exits"), JUDGE) == [0.5], "cost, where no time was measured"


@pytest.mark.zoo
def test_every_rung_of_the_shipped_classifier_is_its_own_point_of_the_cascade() -> None:
    info = load(ZOO / "fashion-ensemble", 2, "cpu").info
    rungs = rungs_of(info)
    assert (rungs[0], len(rungs) > 4) == ("ensemble", True)
    work = classify_work(ClassifyParams(method="auto"), info, [bytes(784)])
    picked = [point_of(info, moved(work, rung).max_cost) for rung in rungs[1:]]
    assert (picked, picked[-1]) == (sorted(set(picked), reverse=True), 0)


def point_of(info: ModelInfo, most: float | None) -> int:
    assert most is not None
    return max(i for i, point in enumerate(info.cascade) if point.cost <= most)
