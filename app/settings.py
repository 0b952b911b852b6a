"""Every knob of the service: name, default, environment variable, one sentence.

Read from flags, then the environment (`PYTORCHLIB_...`), then `.env`. `docs/settings.md` is
generated from this file, and a test keeps them equal.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1024 * 1024


class Settings(BaseSettings):
    """Settings of one serving process."""

    model_config = SettingsConfigDict(
        env_prefix="PYTORCHLIB_", env_file=".env", extra="ignore", frozen=True
    )

    home: Path = Field(Path("var"), description="Folder of models, datasets, runs and jobs.")
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless said.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: str = Field(
        "auto",
        description="Where models compute: cpu, cuda, cuda:N, or auto, which takes every GPU.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="Threads that compute; 0 takes what the cgroup allows."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto",
        description="Numbers that networks compute in; auto takes the quickest here that answers "
        "as published; versions that quantize made are int8 under every one.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether networks are compiled in the background; auto where there is time to "
        "gain.",
    )
    preload: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Models to load before the service is ready, separated by commas."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host names it answers to besides loopback's, separated by commas."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins of web pages that may change things, separated by commas."
    )
    api_key: SecretStr | None = Field(
        None, description="One key with all scopes, for whoever needs no second one."
    )
    api_keys_file: Path | None = Field(
        None, description="A mounted secret: `name scope,scope sha256:HASH` on each line."
    )
    no_auth: bool = Field(
        False, description="Listen on any address though there is no key; keys that are, count."
    )
    signed_link_s: float = Field(
        3600.0, gt=0, le=604_800, description="How long a link to a report opens without a key."
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="A port of its own for /metrics, at the same address and without a key.",
    )
    max_body_bytes: int = Field(64 * MEBIBYTE, ge=1024, description="Largest request body.")
    max_dataset_bytes: int = Field(
        2048 * MEBIBYTE, ge=1024, description="Largest file of a dataset that may be sent."
    )
    dataset_check_timeout_s: float = Field(
        600.0, gt=0, description="How long the check of one dataset may take."
    )
    max_model_bytes: int = Field(
        4096 * MEBIBYTE, ge=1024, description="Largest version that can be uploaded."
    )
    max_picture_bytes: int = Field(10 * MEBIBYTE, ge=64, description="Largest encoded picture.")
    max_picture_pixels: int = Field(
        25_000_000, ge=64, description="Most pixels of one decoded picture."
    )
    max_picture_side: int = Field(8192, ge=8, description="Longest side of a picture in pixels.")
    max_pixels_in_flight: int = Field(
        100_000_000, ge=64, description="Pixels being decoded at one moment, over all requests."
    )
    decode_on: Literal["host", "device"] = Field(
        "host",
        description="Where JPEGs are decoded; device takes them to the GPU many at once, and its "
        "answers drift by what GET /v1/models/{model} tells.",
    )
    max_inputs: int = Field(1024, ge=1, description="Most inputs (pictures, rows) in one request.")
    max_batch_items: int = Field(32, ge=1, le=4096, description="Largest batch on the device.")
    max_delay_ms: float = Field(
        0.0, ge=0, le=1000, description="How long a batch waits to fill; 0 never waits."
    )
    max_queue_items: int = Field(
        1024, ge=1, description="Inputs of one model that may wait; beyond it the answer is 429."
    )
    max_wait_ms: float = Field(
        0.0,
        ge=0,
        description="Longest expected wait for a batch; beyond it the answer is 429. 0 sets none.",
    )
    stuck_after_s: float = Field(
        300.0,
        gt=0,
        description="A forward that has not returned by then ends the process: its device is lost.",
    )
    request_timeout_ms: float = Field(
        30_000, gt=0, description="Deadline of a request that names none."
    )
    evaluation_wait_s: float = Field(
        10.0,
        ge=0,
        le=300,
        description="How long a request waits for its evaluation before it goes on as a job.",
    )
    evaluation_timeout_s: float = Field(
        3600, gt=0, description="No evaluation takes longer; beyond it, it fails."
    )
    data_root: Path = Field(
        Path("data"), description="Folder of mnist and the other built-in datasets."
    )
    memory_budget_mb: int = Field(
        0,
        ge=0,
        description="MiB of weights that may be live at once; beyond it the least recently used "
        "versions go. 0 takes 80 % of a GPU's memory, or half of the machine's.",
    )
    max_explanations: int = Field(
        2, ge=1, le=64, description="Explanations computed at one moment; more are answered 429."
    )
    watch_interval_s: float = Field(
        1.0, gt=0, description="How often the store is looked at for what other processes changed."
    )
    database_url: SecretStr | None = Field(
        None,
        description="Database of jobs, such as postgresql://USER@HOST/NAME; a file in home if "
        "not given.",
    )
    jobs: bool = Field(
        True, description="Whether this process runs jobs; without, `pytorchlib worker` does."
    )
    job_slots: int = Field(1, ge=1, le=64, description="Jobs that run at once in this process.")
    job_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Most threads of one job, of which a small network takes one; "
        "0 is what the cgroup allows.",
    )
    job_processes: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that may share one job; 0 is one a GPU or processor of this "
        "machine.",
    )
    job_memory_mb: int = Field(
        0, ge=0, description="MiB that one job may hold; 0 watches the container's limit alone."
    )
    job_grace_s: float = Field(
        20.0, gt=0, description="How long a job may take to write its snapshot when it must end."
    )
    snapshot_days: float = Field(
        7.0,
        ge=0,
        le=3650,
        description="How long the snapshots of a job that has ended stay, an hour at least; its "
        "curves and its result stay for good.",
    )
    webhook_secret: SecretStr | None = Field(
        None, description="Signs webhooks: `whsec_` and 24 to 64 bytes in base64."
    )
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts that webhooks may go to, separated by commas; without any, none are "
        "sent. A host on no public address also needs its address or network here.",
    )
    webhook_url: str | None = Field(
        None, description="Where every job's webhooks go, besides the job's own `webhook`."
    )
    lease_s: float = Field(
        15.0, ge=1, le=3600, description="A worker that is silent for so long is believed dead."
    )
    drain_s: float = Field(
        5.0, ge=0, description="How long after SIGTERM new requests are still served."
    )
    log_format: Literal["plain", "json"] = Field("plain", description="Shape of a log line.")
    log_requests: Literal["all", "errors", "none"] = Field(
        "errors",
        description="Which requests get a line: all, those answered with 4xx or 5xx, none. Of "
        "those answered with 429 errors gives ten a second a line, and tells how many more came.",
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans; OTEL_EXPORTER_OTLP_ENDPOINT also turns it on.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log line that is written."
    )

    @field_validator("preload", "allowed_hosts", "allowed_origins", "webhook_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator(
        *("api_key", "api_keys_file", "metrics_port", "webhook_secret", "webhook_url"),
        mode="before",
    )
    @classmethod
    def _absent(cls, value: object) -> object:
        """An empty variable is how a compose file says nothing."""
        return None if isinstance(value, str) and not value.strip() else value

    @property
    def datasets_folder(self) -> Path:
        """Where the dataset store rests."""
        return self.home / "datasets"

    @property
    def models_folder(self) -> Path:
        """Where the model store rests."""
        return self.home / "models"
