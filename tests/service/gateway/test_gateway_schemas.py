from __future__ import annotations

from dataclasses import fields

import pytest
from pydantic import ValidationError

from models.api import SEED_LIMIT, ClassifyParams, GenerateParams, SolverOptions
from service.gateway.schemas import ClassifyForm, ClassifyRequest, GenerateRequest, to_params


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": True}, "n"),
        ({"n": "3"}, "n"),
        ({"n": 2.0}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": SEED_LIMIT}, "seed"),
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": "2"}, "guidance"),
        ({"guidance": 20.5}, "guidance"),
        ({"solver": "magic"}, "solver"),
        ({"format": "gif"}, "format"),
        ({"label": True}, "label"),
        ({"label": -1}, "label"),
        ({"label": 1.5}, "label"),
        ({"gear": None}, "gear"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"sede": 3}, "sede"),
        ({"solver_options": {"grid": "spiral"}}, "solver_options"),
        ({"solver_options": {"eta": 1.5}}, "solver_options"),
        ({"solver_options": {"etta": 1.0}}, "solver_options"),
        ({"solver_options": {"corrector": 1}}, "solver_options"),
        ({"solver_options": []}, "solver_options"),
        ({"guidance_interval": [0.1]}, "guidance_interval"),
        ({"guidance_interval": [0.1, 1.5]}, "guidance_interval"),
        ({"guidance_interval": ["0.1", 0.5]}, "guidance_interval"),
    ],
)
def test_generate_refuses_and_names_the_field(body: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerateRequest.model_validate(body)
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("images", [[], ["x"] * 65, [""], "x", [3]])
def test_classify_refuses_images_out_of_range(images: object) -> None:
    with pytest.raises(ValidationError) as caught:
        ClassifyRequest.model_validate({"images": images})
    assert caught.value.errors()[0]["loc"][0] == "images"


def test_absent_fields_take_the_dataclass_defaults() -> None:
    assert to_params(GenerateParams, GenerateRequest.model_validate({})) == GenerateParams()
    assert to_params(ClassifyParams, ClassifyRequest.model_validate({"image": "eA=="})) == ClassifyParams()


def test_values_arrive_as_sent() -> None:
    body = {"label": "Boot", "n": 64, "seed": SEED_LIMIT - 1, "guidance": 2, "solver": "ddim", "gear": "eco"}
    assert to_params(GenerateParams, GenerateRequest.model_validate(body)) == GenerateParams(**body)


def test_nested_values_arrive_as_sent() -> None:
    body = {"solver_options": {"eta": 0.5, "grid": "karras"}, "guidance_interval": [0.25, 1]}
    params = to_params(GenerateParams, GenerateRequest.model_validate(body))
    assert params.solver_options == SolverOptions(eta=0.5, grid="karras")
    assert params.guidance_interval == (0.25, 1.0)


def test_form_fields_are_read_from_text() -> None:
    form = ClassifyForm.model_validate_strings({"top_k": "5", "method": "bridge"})
    assert to_params(ClassifyParams, form) == ClassifyParams(top_k=5, method="bridge")
    with pytest.raises(ValidationError):
        ClassifyForm.model_validate_strings({"top_k": "many"})


@pytest.mark.parametrize(
    ("params", "model"),
    [(GenerateParams, GenerateRequest), (ClassifyParams, ClassifyRequest)],
    ids=["generate", "classify"],
)
def test_the_schema_carries_every_documented_bound(params: type, model: type) -> None:
    properties = model.model_json_schema()["properties"]
    for f in fields(params):
        text = str(properties[f.name])
        assert f.metadata["doc"] == properties[f.name]["description"]
        for bound, key in (("le", "maximum"), ("ge", "minimum"), ("max_length", "maxLength")):
            if bound in f.metadata:
                assert f"'{key}': {f.metadata[bound]}" in text
