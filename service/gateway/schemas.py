"""What crosses HTTP. Request models are derived from models.api, so that a new field is one line there."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from models.api import MAX_ROWS, ClassifyParams, DecisionName, GenerateParams, ModelInfo
from service.errors import OfframpError

P = TypeVar("P")
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
_DERIVED: dict[type[BaseModel], type[Any]] = {}
Base64Image = Annotated[str, Field(min_length=1)]


def request_model(name: str, params: type[Any], **extra: Any) -> type[BaseModel]:
    """A pydantic model with the fields, bounds, defaults and descriptions of the dataclass `params`.

    Strict: no coercion between JSON types, no NaN or infinity, no unknown fields.
    """
    hints = get_type_hints(params)
    derived: dict[str, Any] = {
        f.name: (_constrained(hints[f.name], f.metadata), Field(f.default, description=f.metadata["doc"]))
        for f in fields(params)
    }
    config = ConfigDict(extra="forbid", strict=True, title=name)
    model = create_model(name, __config__=config, __doc__=params.__doc__, **extra, **derived)
    _DERIVED[model] = params
    return model


def to_params(kind: type[P], model: BaseModel) -> P:
    """The dataclass again, from a validated model derived from it."""
    values = {f.name: getattr(model, f.name) for f in fields(kind)}  # type: ignore[arg-type]
    nested = {k: to_params(_DERIVED[type(v)], v) for k, v in values.items() if isinstance(v, BaseModel)}
    return kind(**(values | nested))


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body with nested models written out, as an OpenAPI page needs it."""
    schema = model.model_json_schema()
    nested = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(nested[node["$ref"].rsplit("/", 1)[1]])
        return {key: inline(value) for key, value in node.items()}

    inlined: dict[str, Any] = inline(schema)
    return inlined


def _constrained(hint: Any, bounds: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return reduce(or_, (_constrained(member, bounds) for member in get_args(hint)))
    if isinstance(hint, type) and is_dataclass(hint):
        return request_model(hint.__name__, hint)
    if get_origin(hint) is tuple:
        items = tuple(Annotated[_constrained(item, bounds), Field(strict=True)] for item in get_args(hint))
        return Annotated[tuple[items], Field(strict=False)]  # type: ignore[valid-type]
    if hint in (int, float):
        finite = False if hint is float else None
        limits = {key: bounds.get(key) for key in ("ge", "gt", "le", "lt")}
        return Annotated[hint, Field(**limits, allow_inf_nan=finite)]
    if hint is str and "max_length" in bounds:
        return Annotated[hint, Field(max_length=bounds["max_length"])]
    return hint


GenerateRequest = request_model("GenerateRequest", GenerateParams)
ClassifyForm = request_model("ClassifyForm", ClassifyParams)
ClassifyRequest = request_model(
    "ClassifyRequest",
    ClassifyParams,
    image=(Base64Image | None, Field(None, description="One PNG, JPEG or WebP picture, base64.")),
    images=(
        Annotated[list[Base64Image], Field(min_length=1, max_length=MAX_ROWS)] | None,
        Field(None, description=f"1-{MAX_ROWS} such pictures; give `image` or `images`, not both."),
    ),
)


class Timings(BaseModel):
    """Seconds: waiting in the queue, running, and arrival to answer."""

    queue_s: float
    run_s: float
    total_s: float


class GeneratedImage(BaseModel):
    """One image: base64 of the encoded bytes, its class name, its own seed."""

    b64: str
    label: str
    seed: int


class GenerateReceipt(BaseModel):
    """What the images cost, counted as they ran. Layer evaluations are blocks x network rows."""

    model_config = ConfigDict(extra="allow")

    gear: str = Field(description="What was served: the cheapest that any evaluation ran in.")
    requested: str | None = Field(None, description="`auto`, where the service chose.")
    downgraded: bool = Field(
        False, description="Whether the load made it cheaper than what `auto` gives an idle service."
    )
    why: Literal["load", "deadline"] | None = Field(None, description="Of a downgrade: the queue, or its own deadline.")
    solver: str
    steps: int
    depth: int
    exit_depths: list[int] | list[list[int]] = Field(description="Blocks per evaluation; per image where they differ.")
    layer_evals: int
    layer_evals_full: int
    compute_saved: float


class GenerateResponse(BaseModel):
    """The answer of POST /generate."""

    id: str
    model: str
    images: list[GeneratedImage]
    receipt: GenerateReceipt
    timings: Timings


class RankedClass(BaseModel):
    """A class and its calibrated probability."""

    label: str
    index: int
    score: float


class Classification(RankedClass):
    """The most probable class of one image, its rivals, how unsure the answer is (nats), what to do with it."""

    top_k: list[RankedClass]
    probabilities: dict[str, float]
    uncertainty: dict[str, float]
    decision: DecisionName | None = Field(
        None, description="Absent where the model was not calibrated, or with `purify`."
    )
    prediction_set: list[str] | None = Field(None, description="Class names, likeliest first; present with `alpha`.")


class Purified(BaseModel):
    """Diffusion time that images were noised to, denoising steps, and noises averaged over."""

    u: float
    steps: int
    draws: int


class ClassifyReceipt(BaseModel):
    """How the answer was made; costs are conv + linear MACs relative to `single`.

    `purified` stands with `purify`; `expected_cost` and `image_costs` with `exits` and `cascade`, `escalated` with
    `cascade`, `exits` with `exits` and a cascade that starts with it, `time_vs_single` with the other methods.
    """

    model_config = ConfigDict(extra="allow")

    method: str
    requested: str | None = Field(None, description="`auto`, where the service chose.")
    downgraded: bool = Field(False, description="Whether it got less than an idle service gives.")
    why: Literal["load", "deadline"] | None = Field(None, description="Why less: the queue, or deadlines of what ran.")
    cost_vs_single: float = Field(description="Mean over the images, as they ran.")
    time_vs_single: float | None = Field(
        None, description="As measured once: eager, batches of 32. Absent where it was not, or depends on the images."
    )
    expected_cost: float | None = Field(
        None, description="Mean over validation, of a cascade at the point that max_cost picked."
    )
    escalated: list[int] | None = Field(None, description="Images that the members answered, from 0.")
    image_costs: list[float] | None = Field(None, description="By image.")
    exits: list[int] | None = Field(
        None, description="By image the stage of the source that answered, from 1; 0 where the members did."
    )
    purified: Purified | None = None


class ClassifyResponse(BaseModel):
    """The answer of POST /classify."""

    id: str
    model: str
    results: list[Classification]
    receipt: ClassifyReceipt
    timings: Timings


class ModelList(BaseModel):
    """The answer of GET /models."""

    models: list[ModelInfo]


class Problem(BaseModel):
    """An error as RFC 9457 problem details; `code` is its stable name, `field` the part at fault."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    field: str | None = None
    retry_after_s: int | None = None
    errors: list[dict[str, str]] | None = None


def job_state(state: str) -> JobState:
    """A broker's word (queued, running or an Outcome) in the API's: `dead` is only a way to fail."""
    return cast(JobState, {"ok": "succeeded", "dead": "failed"}.get(state, state))


def problem_of(error: OfframpError, instance: str, request_id: str) -> Problem:
    """An error as a client sees it."""
    return Problem(
        type=f"/docs#{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        instance=instance,
        code=error.code,
        request_id=request_id,
        field=error.field,
        retry_after_s=error.retry_after_s,
    )


class Progress(BaseModel):
    """Evaluations of all images, as of the last checkpoint."""

    done: int
    of: int


class JobView(BaseModel):
    """The answer of GET and DELETE /jobs/{id}."""

    id: str
    model: str
    status: JobState
    created: str = Field(description="RFC 3339, UTC, by the clock of Redis.")
    deadline_ms: int = Field(description="Budget from `created`.")
    position: int | None = Field(None, description="Jobs ahead in its rank of the queue; 200: as many or more.")
    eta_s: float | None = Field(None, description="Seconds until it is taken, at the rate measured now.")
    progress: Progress | None = Field(None, description="Of a running job.")
    result: GenerateResponse | ClassifyResponse | None = Field(None, description="What the synchronous call answers.")
    error: Problem | None = Field(None, description="What the synchronous call would have answered instead.")


class HookData(BaseModel):
    """The job that a webhook is about; fetch its answer from /jobs/{id}/result."""

    id: str
    model: str
    status: JobState
    receipt: dict[str, Any] | None = None
    error: dict[str, str] | None = None


class HookBody(BaseModel):
    """What a webhook says."""

    type: Literal["job.succeeded", "job.failed", "job.expired", "job.cancelled"]
    timestamp: str = Field(description="RFC 3339, UTC; when this try was sent.")
    data: HookData
