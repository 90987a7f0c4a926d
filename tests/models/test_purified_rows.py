"""Purified rows of /classify: alone and in any company, a few a tick; purifiers that cannot be served."""

import json
import shutil

import pytest

from models.api import UserError
from models.store import StoreError
from models.tasks.classifier import load_classifier
from models.tasks.classify import load
from tests.models.classifiers import IMAGES, make_zoo, run, work
from tests.models.purifiers import ENTRY, name_purifier, save_generator, write_purifier


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    make_zoo(root)
    write_purifier(root)
    return root


@pytest.fixture(scope="module")
def task(root):
    return load(root / "toy", 64, "cpu")


def admit(task, slot, draws, image=IMAGES[0]):
    [ticks] = task.admit(work("single", image, purify=draws), [0], [slot])
    return ticks


def test_sixty_four_images_answer_as_alone(task):
    images = [bytes([i]) + IMAGES[i % 12][1:] for i in range(64)]
    rows = run(task, work("bridge", *images, purify=2))
    for i in (0, 7, 31, 63):
        [alone] = run(task, work("bridge", images[i], purify=2), [40])
        assert rows[i].probabilities == pytest.approx(alone.probabilities, abs=1e-4)
    assert rows[0].probabilities != pytest.approx(rows[1].probabilities, abs=1e-4)


def test_a_level_more_in_one_pixel_is_other_noise(task):
    other = bytes([IMAGES[0][0] ^ 1]) + IMAGES[0][1:]
    first, second = (run(task, work("single", image, purify=1))[0] for image in (IMAGES[0], other))
    assert first.probabilities != pytest.approx(second.probabilities, abs=1e-5)


def test_rows_move_first_come_first_and_no_more_than_a_batch_a_tick(task):
    ticks = {slot: admit(task, slot, draws) for slot, draws in ((5, 8), (1, 8), (3, 1), (2, 16))}
    assert set(ticks.values()) == {3}
    assert task.step([1, 2, 3, 5]).waiting == {2, 3}
    assert task.step([2, 3]).waiting == {2}
    assert task.step([2]).waiting == set()
    assert task.step([1, 2, 3, 5]).waiting == {2, 3}


def test_a_slot_that_is_used_again_goes_to_the_end(task):
    for slot, draws in ((0, 8), (1, 8), (2, 8), (0, 8)):
        admit(task, slot, draws)
    assert task.step([0, 1, 2]).waiting == {0}


def test_the_denoiser_runs_once_a_tick_for_rows_at_any_step(task, monkeypatch):
    seen, step = [], type(task.stage.purifier).step
    monkeypatch.setattr(
        type(task.stage.purifier), "step", lambda self, x, n: seen.append(sorted(n)) or step(self, x, n)
    )
    admit(task, 0, 2)
    task.step([0])
    admit(task, 1, 3)
    task.step([0, 1])
    task.step([0, 1])
    assert seen == [[0, 0], [0, 0, 0, 1, 1], [1, 1, 1]]


def test_what_cannot_be_purified_is_refused_by_name(task):
    for options, field in (({"purify": 17}, "purify"), ({"purify": 2, "alpha": 0.1}, "alpha")):
        with pytest.raises(UserError) as refused:
            task.admit(work("single", IMAGES[0], **options), [0], [0])
        assert refused.value.field == field


def test_it_is_advertised_with_its_price(root, task):
    found = task.info.purifier
    assert (found.model, found.gear, found.u, found.steps) == ("toy-dit", "eco", 0.3, 2)
    assert found.methods == ("single", "bridge", "ensemble")
    assert found.calls - 1 < found.cost <= found.calls


def test_the_answers_of_images_as_they_are_keep_their_fingerprint(root):
    before = load_classifier(root / "toy").fingerprint
    config = (root / "toy" / "config.json").read_text()
    name_purifier(root, None)
    assert load_classifier(root / "toy").fingerprint == before
    (root / "toy" / "config.json").write_text(config)


def test_without_its_generator_it_is_not_offered(tmp_path, caplog):
    make_zoo(tmp_path)
    name_purifier(tmp_path, ENTRY)
    task = load(tmp_path / "toy", 2, "cpu")
    assert task.info.purifier is None
    assert "toy-dit is not there" in caplog.text
    with pytest.raises(UserError, match="toy purifies for no method: drop purify"):
        admit(task, 0, 1)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([], "needs model, u, steps and gear"),
        ({"model": "toy-dit"}, "needs model, u, steps and gear"),
        (ENTRY | {"u": "much"}, "needs model, u, steps and gear"),
        (ENTRY | {"u": 0.9}, "u must be above 0 and at most 0.5"),
        (ENTRY | {"steps": 4}, "steps must be from 1 to 3"),
        (ENTRY | {"model": "../toy-dit"}, "must be the name of a folder beside"),
        (ENTRY | {"gear": "warp"}, "no gear 'warp'"),
        (ENTRY | {"model": "toy"}, "kind is 'ensemble', expected 'generator'"),
        (ENTRY | {"model": "small"}, "needs a pixel model of images"),
    ],
)
def test_purifiers_that_cannot_be_served_are_refused(root, tmp_path, entry, words):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    save_generator(tmp_path / "small", side=16)
    name_purifier(tmp_path, entry)
    with pytest.raises(StoreError, match=words):
        load(tmp_path / "toy", 2, "cpu")


def test_a_purifier_of_other_weights_is_refused(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "toy-dit" / "config.json").read_text())
    config["files"]["model.safetensors"] = "0" * 64
    (tmp_path / "toy-dit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="does not match its digest"):
        load(tmp_path / "toy", 2, "cpu")
