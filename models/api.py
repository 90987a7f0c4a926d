"""The face of models/: plain dataclasses and the Task protocol. Standard library only.

A request's fields live here once; the HTTP schema and the wire form are derived from them. Each
field's metadata carries its bounds (`ge`, `gt`, `le`, `lt`, `max_length`) and its description (`doc`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

SolverName = Literal[
    "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_maruyama"
]
GridName = Literal["linspace", "leading", "trailing", "karras", "exponential", "logsnr"]
ImageFormat = Literal["png", "webp", "npy"]
MethodName = Literal["single", "bridge", "bridges", "bridge_network", "distilled", "exits", "ensemble", "cascade"]
DecisionName = Literal["accept", "escalate", "abstain"]
Priority = Literal["high", "normal", "low"]

SEED_LIMIT = 2**53
MAX_ROWS = 64
MAX_DRAWS = 16


def _spec(doc: str, default: Any = None, **bounds: Any) -> Any:
    return field(default=default, metadata={"doc": doc, **bounds})


class UserError(ValueError):
    """A mistake in what a user gave (files, folders, recipes, requests); the message says what to fix.

    `field` names the request's field at fault, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """The fine print of a solver. `None` means the model's or the solver's own choice.

    An option that the chosen solver does not have is refused, not ignored.
    """

    grid: GridName | None = _spec("Spacing of the solver's times.")
    eta: float | None = _spec("ddim: share of the ancestral noise; 0 is deterministic.", ge=0.0, le=1.0)
    variance: Literal["fixed_small", "fixed_large", "learned_range"] | None = _spec("ddpm: variance of a step.")
    form: Literal["midpoint", "heun", "bh1", "bh2"] | None = _spec("dpmpp: midpoint or heun; unipc: bh1 or bh2.")
    corrector: bool | None = _spec("unipc: correct each step with the next evaluation.")
    final_sigma: Literal["zero", "sigma_min"] | None = _spec("dpmpp, unipc: noise level that the last step ends at.")
    lower_order_final: bool | None = _spec("dpmpp, unipc: lower order for the last steps.")
    churn: float | None = _spec("euler, heun: noise added and removed over the whole run (EDM).", ge=0.0, le=200.0)
    churn_min: float | None = _spec("euler, heun: least noise level at which to churn.", ge=0.0, le=1e6)
    churn_max: float | None = _spec("euler, heun: highest noise level at which to churn.", ge=0.0, le=1e6)
    churn_noise: float | None = _spec("euler, heun: scale of the churned noise.", ge=0.0, le=2.0)

    def given(self) -> dict[str, float | str | bool]:
        """The options that are set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """What POST /generate asks for. `None` means: the gear's or the model's own value."""

    model: str | None = _spec("Name of a served generator; the first advertised one if absent.", max_length=128)
    label: int | str | None = _spec(
        "Class index or name; drawn from each image's seed if absent.", ge=0, max_length=128
    )
    n: int = _spec("Images to draw.", 1, ge=1, le=MAX_ROWS)
    seed: int | None = _spec("Image i uses (seed + i) mod 2^53; drawn at random if absent.", ge=0, le=SEED_LIMIT - 1)
    steps: int | None = _spec("Solver steps.", ge=1, le=1000)
    solver: SolverName | None = _spec("Solver.")
    solver_options: SolverOptions | None = _spec("The solver's fine print.")
    guidance: float | None = _spec("Classifier-free guidance scale; 1 is unguided.", ge=0.0, le=20.0)
    guidance_interval: tuple[float, float] | None = _spec(
        "Guide only at diffusion times u from the first to the second (0 is data, 1 is noise).", ge=0.0, le=1.0
    )
    gear: str = _spec(
        "Named point on the cost/quality curve; `auto`: the best that the load allows, never below `floor`.",
        "auto",
        max_length=64,
    )
    floor: str | float | None = _spec(
        "auto: the cheapest gear allowed, or the least class accuracy (of the model's card, at the gears' own steps, "
        "solver and guidance) that it may have; the model's default gear if absent.",
        ge=0.0,
        le=1.0,
        max_length=64,
    )
    max_compute: float | None = _spec("auto: most layer evaluations, relative to `full`.", gt=0.0, le=1.0)
    deadline_ms: int | None = _spec(
        "Budget from arrival to answer, queueing included, milliseconds.", ge=1, le=3_600_000
    )
    priority: Priority | None = _spec("Rank in the queue, at most what the API key allows, which is the default.")
    webhook: str | None = _spec("URL to POST to when the job has ended.", max_length=2000)
    format: ImageFormat = _spec("Encoding of the images.", "png")


@dataclass(frozen=True, kw_only=True)
class ClassifyParams:
    """What POST /classify asks for, beside its images."""

    model: str | None = _spec("Name of a served classifier; the first advertised one if absent.", max_length=128)
    method: MethodName | Literal["auto"] | None = _spec(
        "How to answer; the model's default if absent. `auto`: `ensemble`, less of it where the load asks for that."
    )
    floor: MethodName | None = _spec("auto: the cheapest of ensemble, cascade, bridge and single that may answer.")
    top_k: int = _spec("Classes listed in `top_k`.", 3, ge=1, le=100)
    alpha: float | None = _spec(
        "Also give sets of classes that miss the right one at most this often, over images.", gt=0.0, lt=1.0
    )
    max_cost: float | None = _spec(
        "cascade: mean cost per image to stay within, relative to `single`; chooses cascade if `method` is absent.",
        gt=0.0,
    )
    purify: int | None = _spec(
        "Noise and denoise each image this often before it is classified, and average; not purified if absent.",
        ge=1,
        le=MAX_DRAWS,
    )
    deadline_ms: int | None = _spec(
        "Budget from arrival to answer, queueing included, milliseconds.", ge=1, le=3_600_000
    )
    priority: Priority | None = _spec("Rank in the queue, at most what the API key allows, which is the default.")
    webhook: str | None = _spec("URL to POST to when the job has ended.", max_length=2000)


@dataclass(frozen=True)
class ExitSchedule:
    """Blocks to run as a function of diffusion time u in [0, 1] (0 is data, 1 is noise).

    Attributes:
        edges: exclusive upper end of each bin, increasing; the last is 1.0 and inclusive.
        depths: blocks run in each bin.
        weights: digest of the weights that the schedule was tuned for; empty when for any.
    """

    edges: tuple[float, ...]
    depths: tuple[int, ...]
    weights: str = ""

    def __post_init__(self) -> None:
        if not self.edges or len(self.edges) != len(self.depths):
            raise ValueError("an exit schedule needs as many edges as depths, at least one")
        if self.edges[-1] != 1.0 or list(self.edges) != sorted(set(self.edges)) or self.edges[0] <= 0:
            raise ValueError(f"exit edges must rise from above 0 to exactly 1.0, got {self.edges}")
        if min(self.depths) < 1:
            raise ValueError(f"exit depths must be at least 1, got {self.depths}")

    def depth(self, u: float) -> int:
        """Blocks to run at time `u`."""
        for edge, depth in zip(self.edges, self.depths, strict=True):
            if u < edge:
                return depth
        return self.depths[-1]


@dataclass(frozen=True)
class Gear:
    """A named point on the cost/quality curve of a generator, with its measured place on it.

    The measured fields are those of gears.json and are absent (None) where not measured:
    `layer_evals_ratio` and `time_ratio` are relative to `full` at the same solver, steps, guidance.
    """

    name: str
    schedule: ExitSchedule
    solver: SolverName
    steps: int
    guidance: float
    solver_options: SolverOptions = SolverOptions()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    layer_evals_ratio: float | None = None
    time_ratio: float | None = None
    class_accuracy: float | None = None
    frechet: float | None = None


@dataclass(frozen=True)
class DecisionRule:
    """When a method's answer is accepted, escalated or abstained from, and what validation showed of it.

    Attributes:
        score: uncertainty key that is compared.
        accept: the least sure value that is accepted; None accepts nothing (the target is out of reach).
        abstain: beyond it the method abstains, between the two it escalates; None never abstains.
        target, value, confidence: what `accept` was chosen for.
        coverage: share of validation images accepted; `risk` their error rate, `bound` its upper bound.
    """

    score: str
    accept: float | None
    abstain: float | None
    target: str
    value: float
    confidence: float
    coverage: float
    risk: float | None
    bound: float | None


@dataclass(frozen=True)
class SetRule:
    """How a method's prediction sets were calibrated: conformal rule, images, and the least useful alpha."""

    rule: str
    rows: int
    smallest_alpha: float


@dataclass(frozen=True)
class CascadePoint:
    """A point that `max_cost` may pick: share of validation images that the members answered, mean cost, decision."""

    share: float
    cost: float
    decision: DecisionRule


@dataclass(frozen=True)
class PurifierInfo:
    """The generator that can purify a classifier's images, and what one draw of noise costs before it is classified.

    Attributes:
        model, gear: its name, and the gear whose exits it runs.
        u, steps: diffusion time noised to, and network calls back.
        cost: conv + linear MACs of a draw relative to `single`.
        calls: a draw's price in admission, in network calls of about the size of `single`.
        methods: classify methods that answer purified images.
    """

    model: str
    gear: str
    u: float
    steps: int
    cost: float
    calls: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a worker advertises of a model; the gateway checks requests against it.

    Attributes:
        image: height, width, channels of one image.
        depth: blocks of the full network (generators).
        backend: how the forward is executed, and why.
        solvers: solvers that fit the model's diffusion process (generators).
        weights: digest of the model's weights.
        methods: classify methods and their cost relative to `single` (conv + linear MACs).
        times: classify methods and their time relative to `single`, measured once by `offramp eval classify`: eager,
            batches of 32 test images, whatever `backend` is.
        calls: classify methods and their network calls per image (the unit of admission).
        decisions, sets: by classify method; empty for a model that was not calibrated.
        foreign: when the distance of an image's features speaks against an answer, whatever the method says of it;
            None where it is not measured.
        cascade: points of method `cascade`, by rising cost.
        purifier: what `purify` runs; None where images cannot be purified.
    """

    name: str
    task: Literal["generate", "classify"]
    labels: tuple[str, ...]
    image: tuple[int, int, int]
    weights: str
    description: str = ""
    backend: str = "eager"
    depth: int = 0
    solvers: tuple[SolverName, ...] = ()
    gears: tuple[Gear, ...] = ()
    default_gear: str = ""
    methods: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    decisions: dict[str, DecisionRule] = field(default_factory=dict)
    sets: dict[str, SetRule] = field(default_factory=dict)
    foreign: DecisionRule | None = None
    cascade: tuple[CascadePoint, ...] = ()
    purifier: PurifierInfo | None = None
    default_method: str = ""


@dataclass(frozen=True, kw_only=True)
class GenerateWork:
    """A resolved generate job: every choice made, nothing left to default.

    `ladder`: gears that the worker may change to under load, best first, `gear` the first; empty for a named gear.
    """

    model: str
    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    solver: SolverName
    guidance: float
    gear: str
    solver_options: SolverOptions = SolverOptions()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    overrides: tuple[str, ...] = ()
    ladder: tuple[str, ...] = ()
    format: ImageFormat = "png"

    @property
    def rows(self) -> int:
        """Images, that is slots."""
        return len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class ClassifyWork:
    """A resolved classify job. `images` are raw uint8 HWC bytes of the model's image shape, `purify` draws of noise.

    `ladder`: rungs (service/ladders.py) that the worker may change to under load, best first; empty for a named method.
    """

    model: str
    images: tuple[bytes, ...]
    method: MethodName
    top_k: int
    alpha: float | None = None
    max_cost: float | None = None
    purify: int | None = None
    ladder: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Images, that is slots."""
        return len(self.images)


@dataclass(frozen=True)
class GeneratedRow:
    """One finished image: uint8 pixels (H, W, C) with what they cost, counted as it ran.

    `macs` and `macs_full`: conv + linear multiply-accumulates of the network; 0 where blocks tell the whole story.
    """

    pixels: Any
    label: int
    seed: int
    exit_depths: tuple[int, ...]
    layer_evals: int
    layer_evals_full: int
    macs: int = 0
    macs_full: int = 0


@dataclass(frozen=True)
class ClassifiedRow:
    """One classified image: calibrated probabilities (K,) and uncertainty in nats.

    `decision` is absent (None) where the model was not calibrated or the image purified, `prediction_set` (class
    indices, likeliest first) where no alpha was asked for. `escalated`: a cascade's members ran. `exit`: the stage of
    the source that it left after (from 1), 0 where no exit answered.
    """

    probabilities: tuple[float, ...]
    uncertainty: dict[str, float]
    decision: DecisionName | None = None
    prediction_set: tuple[int, ...] | None = None
    escalated: bool = False
    exit: int = 0


@dataclass(frozen=True)
class StepStats:
    """What one tick did, for metrics: rows (images), and blocks x network rows run and at full depth.

    `depth_counts` maps (time bin 0..9 of u in tenths, depth) to rows; empty for classify. `decoded` of the
    rows went through the codec. `waiting` are slots that were listed and did not move this time; `finished` those
    that moved and turn out to need no more, whatever admission said.
    """

    rows: int
    decoded: int = 0
    waiting: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    layer_evals: int = 0
    layer_evals_full: int = 0
    depth_counts: Mapping[tuple[int, int], int] = field(default_factory=dict)


W_contra = TypeVar("W_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class Task(Protocol[W_contra, R_co]):
    """Three verbs over a pool of slots: admit, step, collect.

    Slots are integers below `capacity`; the caller owns which are free. A row admitted with e
    evaluations is stepped e times (0 is allowed), or until a step names it in `StepStats.finished`,
    then collected; a row may be dropped at any time by simply reusing its slot.
    """

    info: ModelInfo
    capacity: int

    def admit(self, work: W_contra, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Place images `indices` of `work` in `slots`; returns each row's evaluations to come, at most."""

    def step(self, slots: Sequence[int]) -> StepStats:
        """Advance the listed rows by one evaluation, all in one batch, but for those in `StepStats.waiting`.

        When it raises, no row has moved: the caller tries again with fewer.
        """

    def collect(self, slots: Sequence[int]) -> Sequence[R_co]:
        """Outputs of finished rows, in the order of `slots`."""

    def receipt(self, work: W_contra, rows: Sequence[Any]) -> dict[str, Any]:
        """The receipt of a finished job (keys: docs/api.md)."""

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        """State of running rows, as safetensors; empty for a row that is as cheap to begin again."""

    def restore(self, work: W_contra, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]) -> Any:
        """As `admit`, from saved states, none of them empty; on a CPU the outputs have the bits of an unbroken run."""

    def preview(self, slots: Sequence[int]) -> Sequence[Any]:
        """What running rows look like by now: uint8 pixels (H, W, C), or None."""

    def shift(self, work: W_contra, slots: Sequence[int]) -> None:
        """Run what is left of running rows in the gear of `work`, which is else as they were admitted with; a task
        whose rows cannot change goes on as it began."""


def planned_blocks(
    gear: Gear, steps: int, guidance: float, solver: str = "", interval: tuple[float, float] = (0.0, 1.0)
) -> list[int]:
    """Blocks x network rows of each evaluation of one image, with times u = 1 - i/steps whatever the grid.

    Exact for grids that are uniform in u, an estimate for others; Heun evaluates twice but in its last step.
    """
    blocks = []
    for i in range(steps):
        u = 1.0 - i / steps
        guided = guidance != 1.0 and interval[0] <= u <= interval[1]
        calls = 2 if solver == "heun" and i < steps - 1 else 1
        blocks += [gear.schedule.depth(u) * (2 if guided else 1)] * calls
    return blocks


def planned_layer_evals(
    gear: Gear,
    steps: int,
    guidance: float,
    rows: int,
    solver: str = "",
    interval: tuple[float, float] = (0.0, 1.0),
) -> int:
    """Blocks x network rows that `rows` images will run, as `planned_blocks` has it."""
    return rows * sum(planned_blocks(gear, steps, guidance, solver, interval))


@dataclass(frozen=True)
class Runtime:
    """How a worker runs its models.

    Attributes:
        backend: how a forward is executed, a name of registry.BACKENDS.
        budget_s: seconds that backend `auto` may measure.
        cache: folder for exported segments.
        force_schedules: serve exit schedules that were tuned for other weights.
        precision: what diffusion networks run in: fp32, bf16, or auto, which is bf16 on CUDA where the model promises
            that its numbers hold in it.
    """

    backend: str = "eager"
    budget_s: float = 60.0
    cache: str = ".offramp/cache"
    force_schedules: bool = False
    precision: str = "auto"
