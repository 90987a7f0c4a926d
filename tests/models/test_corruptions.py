import numpy as np
import pytest

from models.api import UserError
from models.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt

KINDS = list(CORRUPTIONS)


def pictures(n=6, channels=1):
    """Smooth bright blobs off centre on black."""
    y, x = np.mgrid[:28, :28]
    blobs = [np.exp(-((x - 10 - i) ** 2 + (y - 14) ** 2) / 18.0) for i in range(n)]
    return np.repeat(np.rint(255 * np.stack(blobs)[..., None]).astype(np.uint8), channels, 3)


def distance(a, b):
    return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_input_are_kept_and_seeds_repeat(kind, channels):
    images = pictures(channels=channels)
    before = images.copy()
    found = corrupt(images, kind, 3, seed=4)
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    assert (images == before).all()
    assert (found == corrupt(images, kind, 3, seed=4)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_severity_is_further_from_the_original(kind):
    images = pictures()
    steps = [distance(corrupt(images, kind, s), images) for s in SEVERITIES]
    assert steps == sorted(steps)
    assert steps[0] > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_those_after_it(kind):
    images = pictures()
    assert (corrupt(images, kind, 2)[:3] == corrupt(images[:3], kind, 2)).all()


@pytest.mark.parametrize("kind", ["noise", "rotation"])
def test_another_seed_corrupts_differently(kind):
    images = pictures(20)
    assert (corrupt(images, kind, 2, seed=0) != corrupt(images, kind, 2, seed=1)).any()


def test_blur_keeps_brightness_and_a_flat_image():
    images = pictures()
    assert corrupt(images, "blur", 3).mean() == pytest.approx(images.mean(), rel=0.02)
    assert (corrupt(np.full((1, 28, 28, 1), 77, np.uint8), "blur", 5) == 77).all()


def test_blur_is_a_gaussian_of_the_stated_width():
    point = np.zeros((1, 29, 29, 1), np.uint8)
    point[0, 14, 14, 0] = 255
    row = corrupt(point, "blur", 3)[0, 14, :, 0].astype(float)
    assert row[15] / row[14] == pytest.approx(np.exp(-0.5), rel=0.03)


def test_noise_has_the_stated_strength():
    grey = np.full((20, 28, 28, 1), 128, np.uint8)
    assert corrupt(grey, "noise", 2).std() == pytest.approx(0.08 * 255, rel=0.03)


def test_rotation_turns_both_ways_about_the_centre():
    image = np.repeat(pictures(1), 30, 0)
    turned = corrupt(image, "rotation", 5)
    assert len(np.unique(turned.reshape(30, -1), axis=0)) == 2
    centre = np.zeros((1, 29, 29, 1), np.uint8)
    centre[0, 13:16, 13:16] = 255
    assert corrupt(centre, "rotation", 5)[0, 14, 14, 0] == 255


@pytest.mark.parametrize(("kind", "severity"), [("fog", 1), ("blur", 0), ("blur", 6)])
def test_unknown_corruptions_are_refused(kind, severity):
    with pytest.raises(UserError, match="known: blur, noise, rotation at severities 1 to 5"):
        corrupt(pictures(), kind, severity)


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4, 1)), np.zeros((4, 4), np.uint8)])
def test_only_uint8_batches_are_taken(images):
    with pytest.raises(UserError, match="uint8 images"):
        corrupt(images, "blur", 1)
