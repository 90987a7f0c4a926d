from __future__ import annotations

from dataclasses import replace

import pytest

from models.api import (
    SEED_LIMIT,
    ClassifyParams,
    ExitSchedule,
    Gear,
    GenerateParams,
    ModelInfo,
    PurifierInfo,
    SolverOptions,
)
from service.errors import BadRequest, NoWorker, UnknownName
from service.gateway.admission import price
from service.gateway.resolve import classify_work, generate_work, pick_label, pick_model, splitmix64

LABELS = ("T-shirt/top", "Trouser", "Boot")
FULL = Gear("full", ExitSchedule((1.0,), (8,)), "ddim", 10, 2.0)
ECO = Gear("eco", ExitSchedule((0.5, 1.0), (8, 4)), "ddim", 10, 1.0)
DRAWER = ModelInfo(
    name="drawer", task="generate", labels=LABELS, image=(28, 28, 1), weights="w", depth=8,
    gears=(FULL, ECO), default_gear="eco",
)  # fmt: skip
JUDGE = ModelInfo(
    name="judge", task="classify", labels=LABELS, image=(28, 28, 1), weights="w",
    methods={"single": 1.0, "bridge": 1.2}, calls={"single": 1, "bridge": 2}, default_method="bridge",
)  # fmt: skip
INFOS = {"judge": JUDGE, "drawer": DRAWER}


def test_models_are_found_by_name_and_task() -> None:
    assert pick_model(INFOS, None, "generate") is DRAWER
    assert pick_model(INFOS, "judge", "classify") is JUDGE
    with pytest.raises(UnknownName, match="drawer") as caught:
        pick_model(INFOS, "judge", "generate")
    assert caught.value.field == "model"
    with pytest.raises(NoWorker):
        pick_model({"judge": JUDGE}, "drawer", "generate")


@pytest.mark.parametrize(("label", "index"), [(0, 0), (2, 2), ("boot", 2), ("T-SHIRT/TOP", 0)])
def test_labels_by_index_or_name(label: int | str, index: int) -> None:
    assert pick_label(LABELS, label) == index


@pytest.mark.parametrize("label", [3, "Sandal", "0"])
def test_unknown_labels_are_named(label: int | str) -> None:
    with pytest.raises(UnknownName, match=str(label)) as caught:
        pick_label(LABELS, label)
    assert caught.value.field == "label"


def test_seeds_count_up_and_wrap() -> None:
    work = generate_work(GenerateParams(seed=SEED_LIMIT - 1, n=3, label=1), DRAWER, "png")
    assert work.seeds == (SEED_LIMIT - 1, 0, 1)
    assert work.labels == (1, 1, 1)


def test_a_drawn_label_depends_on_its_own_seed_only() -> None:
    together = generate_work(GenerateParams(seed=7, n=64), DRAWER, "png")
    alone = [generate_work(GenerateParams(seed=seed), DRAWER, "png").labels[0] for seed in together.seeds]
    assert list(together.labels) == alone
    assert set(alone) == {0, 1, 2}


def test_splitmix64_matches_the_published_sequence() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317


def test_absent_seeds_are_drawn() -> None:
    draws = {generate_work(GenerateParams(), DRAWER, "png").seeds[0] for _ in range(8)}
    assert len(draws) == 8
    assert all(0 <= seed < SEED_LIMIT for seed in draws)


def test_auto_is_the_best_gear_of_the_defaults_trajectory_without_overrides() -> None:
    work = generate_work(GenerateParams(), DRAWER, "webp")
    assert (work.gear, work.steps, work.solver, work.guidance) == ("eco", 10, "ddim", 1.0)
    assert work.overrides == ()
    assert work.format == "webp"


def test_explicit_fields_override_the_gear_where_they_differ() -> None:
    params = GenerateParams(gear="full", steps=10, solver="ddpm", guidance=0.0)
    work = generate_work(params, DRAWER, "png")
    assert (work.steps, work.solver, work.guidance) == (10, "ddpm", 0.0)
    assert work.overrides == ("solver", "guidance")


def test_options_add_to_the_gears_unless_the_solver_changes() -> None:
    gear = replace(FULL, solver_options=SolverOptions(eta=0.5), guidance_interval=(0.2, 1.0))
    info = replace(DRAWER, gears=(gear,), default_gear="full", solvers=("ddim", "heun"))
    karras = SolverOptions(grid="karras")
    work = generate_work(GenerateParams(solver_options=karras), info, "png")
    assert work.solver_options == SolverOptions(eta=0.5, grid="karras")
    assert (work.guidance_interval, work.overrides) == ((0.2, 1.0), ("solver_options",))
    other = generate_work(GenerateParams(solver="heun", solver_options=karras), info, "png")
    assert other.solver_options == karras
    assert other.overrides == ("solver", "solver_options")
    assert generate_work(GenerateParams(), info, "png").overrides == ()


def test_solvers_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(UnknownName, match="known: ddim, heun") as caught:
        generate_work(GenerateParams(solver="ddpm"), replace(DRAWER, solvers=("ddim", "heun")), "png")
    assert caught.value.field == "solver"


def test_a_falling_guidance_interval_is_refused() -> None:
    with pytest.raises(BadRequest, match="lower end first") as caught:
        generate_work(GenerateParams(guidance_interval=(0.8, 0.2)), DRAWER, "png")
    assert caught.value.field == "guidance_interval"


def test_heun_costs_two_evaluations_a_step_and_unguided_times_cost_one_row() -> None:
    heun = generate_work(GenerateParams(gear="full", solver="heun", steps=4, guidance=1.0), DRAWER, "png")
    assert price(heun, DRAWER) == (2 * 4 - 1) * 8
    late = generate_work(GenerateParams(gear="full", steps=4, guidance_interval=(0.0, 0.5)), DRAWER, "png")
    assert price(late, DRAWER) == (1 + 1 + 2 + 2) * 8  # u = 1, .75, .5, .25


def test_unknown_gear_and_method_list_what_is_known() -> None:
    with pytest.raises(UnknownName, match="auto, full, eco") as gear:
        generate_work(GenerateParams(gear="warp"), DRAWER, "png")
    assert gear.value.field == "gear"
    with pytest.raises(UnknownName, match="single, bridge") as method:
        classify_work(ClassifyParams(method="ensemble"), JUDGE, [b""])
    assert method.value.field == "method"


def test_classify_defaults_and_clipped_top_k() -> None:
    work = classify_work(ClassifyParams(top_k=100), JUDGE, [b"a", b"b"])
    assert (work.method, work.top_k, work.rows) == ("bridge", 3, 2)


def test_a_cost_without_a_cascade_is_refused() -> None:
    with pytest.raises(BadRequest, match="only method cascade") as refused:
        classify_work(ClassifyParams(max_cost=3.0), JUDGE, [b""])
    assert refused.value.field == "max_cost"


PURIFIER = PurifierInfo("drawer", "full", 0.3, 1, 13.5, 14, ("single", "bridge"))


def test_purified_images_are_priced_by_draw() -> None:
    info = replace(JUDGE, purifier=PURIFIER)
    work = classify_work(ClassifyParams(purify=4), info, [b"a"] * 3)
    assert work.purify == 4
    assert price(work, info) == 3 * 4 * (14 + 2)


def test_purify_alone_is_answered_by_a_method_that_can() -> None:
    info = replace(JUDGE, purifier=replace(PURIFIER, methods=("single",)))
    assert classify_work(ClassifyParams(purify=1), info, [b"a"]).method == "single"
    assert classify_work(ClassifyParams(purify=1), replace(JUDGE, purifier=PURIFIER), [b"a"]).method == "bridge"


@pytest.mark.parametrize(
    ("params", "info", "field", "words"),
    [
        (ClassifyParams(purify=1), JUDGE, "purify", "judge has no purifier: drop purify"),
        (
            ClassifyParams(purify=1, method="bridge"),
            replace(JUDGE, purifier=replace(PURIFIER, methods=("single",))),
            "purify",
            "bridge does not answer purified images; these do: single",
        ),
        (ClassifyParams(purify=1, alpha=0.1), replace(JUDGE, purifier=PURIFIER), "alpha", "drop alpha, or purify"),
    ],
)
def test_what_cannot_be_purified_is_refused(params: ClassifyParams, info: ModelInfo, field: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refused:
        classify_work(params, info, [b""])
    assert refused.value.field == field


def test_prices() -> None:
    two_full = generate_work(GenerateParams(gear="full", n=2), DRAWER, "png")
    assert price(two_full, DRAWER) == 10 * 8 * 2 * 2  # steps, blocks, images, guided
    eco = generate_work(GenerateParams(gear="eco", steps=4), DRAWER, "png")
    assert price(eco, DRAWER) == 4 + 4 + 4 + 8  # u = 1, .75, .5 (upper edges are exclusive), .25
    assert price(classify_work(ClassifyParams(), JUDGE, [b"a"] * 3), JUDGE) == 6
