from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from models.api import ClassifiedRow, GeneratedRow
from service.metrics import WorkerMetrics
from service.protocol import Result, decode, encode
from service.worker.engine import Finished
from service.worker.progress import Progress
from service.worker.results import PREVIEW_BYTES, encode_image, record, to_result, told
from tests.service.worker.toy import ToyClassify, ToyGenerate
from tests.service.worker.work import delivery, draw, judge

pictures = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])).flatmap(
    lambda shape: arrays(np.uint8, shape)
)


@given(pictures, st.sampled_from(["png", "webp", "npy"]))
def test_every_format_gives_the_pixels_back(pixels: np.ndarray, format: str) -> None:
    data = io.BytesIO(encode_image(pixels, format))
    back = np.load(data, allow_pickle=False) if format == "npy" else np.asarray(Image.open(data))
    grey_as_colour = format == "webp" and pixels.shape[2] == 1
    expected = np.repeat(pixels, 3, axis=2) if grey_as_colour else pixels
    np.testing.assert_array_equal(back.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2, 1)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8)], ids=str
)
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_image(pixels, "png")


def test_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="bmp"):
        encode_image(np.zeros((2, 2, 1), np.uint8), "bmp")


def test_answers_survive_the_wire_and_are_counted() -> None:
    metrics = WorkerMetrics()
    for task in (ToyGenerate(), ToyClassify()):
        metrics.declare(task.info, "cpu")
    row = GeneratedRow(np.zeros((2, 2, 1), np.uint8), 3, 5, (4,), 4, 4)
    drawn = Finished(delivery(draw(rows=2, format="png")), "ok", rows=(row, row), receipt={"gear": "full"}, run_s=0.5)
    uncertainty = {"entropy": 0.5, "disagreement_source_vs_estimate": 0.1}
    judged = Finished(
        delivery(judge()),
        "ok",
        rows=(ClassifiedRow((0.25, 0.75), uncertainty, "escalate", (1, 0), exit=2),),
    )
    for model, done in (("toy", drawn), ("judge", judged)):
        result = to_result(done, "w", 10**6)
        assert decode(Result, encode(result)) == result
        record(metrics, model, result, done)
    assert to_result(drawn, "w", 10**6).images[0].seed == 5
    [prediction] = to_result(judged, "w", 10**6).predictions
    assert (prediction.probabilities, prediction.decision, prediction.prediction_set) == (
        (0.25, 0.75),
        "escalate",
        (1, 0),
    )

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("offramp_images_total", model="toy", mode="full") == 2
    assert value("offramp_images_total", model="judge", mode="single") == 1
    assert value("offramp_jobs_total", model="judge", outcome="ok") == 1
    assert value("offramp_classify_exits_total", model="judge", exit="2") == 1
    assert value("offramp_classify_exits_total", model="judge", exit="0") is None
    assert value("offramp_predictive_entropy_nats_sum", model="judge", method="single") == 0.5
    assert value("offramp_decisions_total", model="judge", method="single", decision="escalate") == 1
    assert value("offramp_decisions_total", model="judge", method="single", decision="accept") is None
    assert value("offramp_disagreement_nats_sum", model="judge", method="single") == 0.1


def test_what_was_served_is_counted_and_not_what_was_asked() -> None:
    metrics, info = WorkerMetrics(), ToyGenerate().info
    metrics.declare(replace(info, gears=(*info.gears, replace(info.gears[0], name="half"))), "cpu")
    row = GeneratedRow(np.zeros((2, 2, 1), np.uint8), 3, 5, (4,), 4, 4)
    receipts = [{"gear": "half", "downgraded": True}, {"gear": "full", "downgraded": False}]
    for receipt, outcome in ((receipts[0], "ok"), (receipts[1], "ok"), (receipts[0], "failed")):
        done = Finished(delivery(draw(rows=2, format="png")), outcome, rows=(row, row), receipt=receipt)  # type: ignore[arg-type]
        record(metrics, "toy", to_result(done, "w", 10**6), done)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "toy", **labels})

    assert value("offramp_images_total", mode="half") == 2
    assert value("offramp_images_total", mode="full") == 2
    assert value("offramp_jobs_by_gear_total", gear="half", downgraded="true") == 1
    assert value("offramp_jobs_by_gear_total", gear="full", downgraded="false") == 1
    assert value("offramp_jobs_by_gear_total", gear="half", downgraded="false") == 0


def test_images_larger_than_a_result_may_be_are_a_failure_that_names_the_setting() -> None:
    row = GeneratedRow(np.zeros((2, 2, 1), np.uint8), 3, 5, (4,), 4, 4)
    result = to_result(Finished(delivery(draw(format="png")), "ok", rows=(row,)), "w", 10)
    assert (result.outcome, result.images) == ("failed", ())
    assert result.failure is not None
    assert "OFFRAMP_MAX_RESULT_BYTES" in result.failure.message


def test_previews_are_told_up_to_a_size_in_all() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)  # does not compress: 192 KiB
    flat = np.zeros((256, 256, 3), np.uint8)
    _, raw = told(Progress(delivery(draw()), 1, 2, previews={0: flat, 1: noise, 2: noise, 3: flat}))
    pictures = decode(dict[int, bytes], raw)
    assert list(pictures) == [0, 1, 3]
    assert sum(map(len, pictures.values())) <= PREVIEW_BYTES
    huge = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    assert told(Progress(delivery(draw()), 1, 2, previews={0: huge}))[1] == b""
