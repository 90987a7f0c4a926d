"""Settings: environment variables with the prefix OFFRAMP_. A wrong value refuses to boot."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.registry import BACKENDS


class Settings(BaseSettings):
    """Every setting of every process; docs/settings.md is made from this class."""

    model_config = SettingsConfigDict(env_prefix="OFFRAMP_", env_ignore_empty=True, frozen=True)

    redis_url: str = Field("", description="Redis or Valkey server, redis://, rediss:// or unix://; empty: embedded.")
    data_dir: Path = Field(Path(".offramp"), description="Where the embedded server keeps its data.")
    models: Path | None = Field(None, description="Folder of model folders; empty: the zoo that ships.")
    host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port the gateway listens on.")
    worker_host: str = Field("127.0.0.1", description="Address the worker's metrics listen on.")
    worker_metrics_port: int = Field(9100, ge=1, le=65535, description="Port of the worker's metrics.")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    threads: int = Field(
        0, ge=0, le=1024, description="Torch threads of a worker; 0: OMP_NUM_THREADS, or one less than the cores."
    )
    backend: str = Field(
        "eager",
        description="How networks run: eager, compiled, onnx, cudagraph, compiled_cudagraph, or auto (measured).",
    )
    backend_budget_s: float = Field(60.0, gt=0.0, le=3600.0, description="Longest that auto may build and measure.")
    precision: str = Field(
        "auto",
        pattern="^(auto|fp32|bf16)$",
        description="Diffusion networks: fp32, bf16, or auto: bf16 on CUDA where the model promises its numbers in it.",
    )
    cache_dir: Path = Field(Path(".offramp/cache"), description="Where backend onnx keeps what it exports.")
    force_schedules: bool = Field(
        False, description="Serve exit schedules that were tuned for other weights, instead of refusing."
    )
    slots: int = Field(64, ge=1, le=4096, description="Rows a worker keeps in flight for each model.")
    adapt: bool = Field(True, description="Let the load decide what gear and method auto give; off: always the best.")
    shadow_share: float = Field(
        0.01, ge=0.0, le=1.0, description="Share of downgraded answers that an idle worker makes again to compare."
    )
    lease_s: float = Field(10.0, ge=1.0, le=600.0, description="A job whose worker is silent this long is redelivered.")
    max_deliveries: int = Field(5, ge=1, le=100, description="A job delivered more often than this fails.")
    drain_s: float = Field(
        20.0,
        ge=0.0,
        le=600.0,
        description="A stopping worker hands back, checkpointed, what it has not finished by then.",
    )
    checkpoint_ticks: int = Field(16, ge=0, le=100_000, description="Running rows are saved this often; 0: never.")
    checkpoint_max_bytes: int = Field(2**20, ge=0, description="Largest saved state of a row.")
    deadline_s: float = Field(120.0, gt=0.0, le=3600.0, description="Deadline of a request that names none.")
    result_ttl_s: int = Field(600, ge=10, le=86_400, description="How long a finished result is kept.")
    idempotency_ttl_s: int = Field(
        86_400, ge=10, le=30 * 86_400, description="How long an Idempotency-Key is refused to other requests."
    )
    max_backlog: int = Field(500_000, ge=1, description="Queued cost per model above which requests get 429.")
    max_result_bytes: int = Field(64 * 2**20, ge=1024, description="Largest encoded result of a job.")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="Largest request body.")
    max_pixels: int = Field(4_000_000, ge=1, description="Largest picture, in pixels, that is decoded.")
    webhook_secret: SecretStr | None = Field(
        None, description="Signs webhooks: whsec_ and 24 to 64 bytes as base64; empty: requests with one are refused."
    )
    webhook_private: bool = Field(False, description="Let webhooks use http and reach private addresses.")
    log_level: str = Field("info", pattern=r"^(debug|info|warning|error)$", description="Log level.")
    api_keys_file: Path | None = Field(None, description="TOML file of API keys, hashed; read again when it changes.")
    api_keys: str = Field("", description="API keys with default rights, ID:SHA256 separated by commas.")
    allow_anonymous: bool = Field(
        False, description="Ask nobody for a key, where none is set, on an address that others reach."
    )

    @field_validator("redis_url")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        if value not in BACKENDS:
            raise ValueError(f"must be one of {', '.join(BACKENDS)}")
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _signs(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            prefix, text = value.get_secret_value()[:6], value.get_secret_value()[6:]
            try:
                fits = prefix == "whsec_" and 24 <= len(b64decode(text, validate=True)) <= 64
            except ValueError:
                fits = False
            if not fits:
                raise ValueError("must be whsec_ and 24 to 64 bytes as base64: echo whsec_$(openssl rand -base64 32)")
        return value

    @field_validator("models")
    @classmethod
    def _holds_models(cls, value: Path | None) -> Path | None:
        if value is not None and not any(value.glob("*/config.json")):
            raise ValueError("must be a folder that holds model folders (each with a config.json)")
        return value


class ConfigError(SystemExit):
    """Settings that cannot be used; exits with the list of what to fix."""


def load_settings() -> Settings:
    """Read the environment or stop with one line per wrong variable."""
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError("wrong settings:\n  " + "\n  ".join(map(_line, error.errors()))) from None


def _line(error: Any) -> str:
    name = "_".join(map(str, error["loc"]))
    shown = "***" if "secret" in name else repr(error["input"])
    return f"OFFRAMP_{name.upper()}={shown}: {error['msg']}"
