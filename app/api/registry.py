"""`GET /v1/models`: what the store holds. The list is readable by OpenAI's client as well."""

import asyncio
from dataclasses import asdict
from typing import Any, Final, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from app.api.permission import requires
from app.api.schema import error_answers, shown
from app.engine.device_decoding import DecodingDrift
from app.engine.execution import Execution
from app.engine.live import LiveModels
from app.engine.predictor import Predictor
from models.manifest import Lineage, Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import PRODUCTION, ModelStore

_SUMMARY: Final = {
    "id": "digits",
    "object": "model",
    "created": 1795396800,
    "owned_by": "local",
    "versions": [1, 2],
    "aliases": {"production": 2},
}
_DESCRIPTION: Final = {
    **_SUMMARY,
    "production": {
        "version": 2,
        "digest": "309aaa5384dea75e44c52c7f7dc27532a1d7903fc467982d87ef1fc54c712d69",
        "created": 1795396800,
        "network": {
            "name": "cnn",
            "options": {"channels": 1, "size": 8, "num_classes": 10, "width": 16},
        },
        "labels": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
        "input_shape": [1, 8, 8],
        "preprocessing": {
            "steps": [
                {"step": "decode"},
                {"step": "color", "mode": "L"},
                {"step": "resize", "size": [8, 8], "interpolation": "box"},
                {"step": "scale", "divisor": 255.0},
            ]
        },
        "metrics": {"accuracy": 0.986},
        "lineage": {"dataset": "digits", "method": "train", "seed": 0},
        "live": True,
        "execution": {
            "form": "bf16, channels last",
            "compiled": [1, 2, 4, 8],
            "trials": [
                {
                    "form": "fp32",
                    "ms": {"1": 26.1},
                    "change": 0.0,
                    "verdict": "2.12 times as slow as the chosen one",
                },
                {
                    "form": "bf16, channels last",
                    "ms": {"1": 12.9},
                    "change": 0.004,
                    "verdict": "chosen",
                },
            ],
        },
    },
}


class ModelSummary(BaseModel):
    """One model."""

    id: str = Field(description="Its name.", examples=["digits"])
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time of its newest version.")
    owned_by: str = "local"
    versions: list[int] = Field(description="Published numbers, ascending.")
    aliases: dict[str, int] = Field(description="Alias to version number.")


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelSummary]


class TrialDescription(BaseModel):
    """How one form of the network did when this version was loaded."""

    form: str
    ms: dict[int, float] = Field(description="Rows in the batch to milliseconds for it.")
    change: float | None = Field(
        description="Largest change of a golden output, relative to the largest."
    )
    verdict: str


class ExecutionDescription(BaseModel):
    """How a live version computes, and why."""

    form: str = Field(description="Precision and layout.", examples=["bf16, channels last"])
    compiled: list[int] = Field(description="Batch sizes that run compiled.")
    trials: list[TrialDescription]


class DriftDescription(BaseModel):
    """What decoding on the device changes, seen on golden inputs as JPEGs."""

    num_pictures: int
    mean_levels: float = Field(description="Mean difference of a pixel, of 255.")
    most_levels: int = Field(description="Largest difference of a pixel, of 255.")
    change: float = Field(description="Largest change of a logit, relative to the largest.")
    num_same: int = Field(description="Pictures whose best label is the same.")


class VersionDescription(BaseModel):
    """What one version says of itself."""

    version: int
    digest: str | None = Field(description="Of what computes: the version's identity.")
    created: int
    network: NetworkSpec
    labels: list[str]
    input_shape: list[int] = Field(description="Shape of one input after preprocessing.")
    preprocessing: Preprocessing
    metrics: dict[str, Any]
    lineage: Lineage
    live: bool = Field(description="Whether it is in device memory now.")
    execution: ExecutionDescription | None = Field(
        None, description="How it computes, where it is live."
    )
    decoding_drift: DriftDescription | None = Field(
        None, description="Where it is live and JPEGs are decoded on the device: how answers drift."
    )


class ModelDescription(ModelSummary):
    """One model with the version that its bare name means."""

    production: VersionDescription | None
    failed: dict[int, str] = Field(
        default_factory=dict, description="Versions that could not be loaded, and why."
    )


def registry_routes(store: ModelStore, live: LiveModels) -> APIRouter:
    """The routes that describe models."""
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get(
        "",
        summary="List all models, their versions and aliases.",
        dependencies=[requires("predict")],
        responses={**shown({"object": "list", "data": [_SUMMARY]}), **error_answers(400, 500, 503)},
    )
    async def list_models() -> ModelList:
        return ModelList(data=await asyncio.to_thread(_summaries, store))

    @router.get(
        "/{model}",
        summary="Describe one model and the version that its bare name means.",
        dependencies=[requires("predict")],
        responses={**shown(_DESCRIPTION), **error_answers(400, 404, 422, 500, 503)},
    )
    async def describe_model(
        model: str = Path(description="Name of the model.", examples=["digits"]),
    ) -> ModelDescription:
        return await asyncio.to_thread(_describe, store, live, model)

    return router


def _summaries(store: ModelStore) -> list[ModelSummary]:
    return [_summary(store, name) for name in store.names()]


def _summary(store: ModelStore, name: str) -> ModelSummary:
    aliases = store.aliases(name)
    versions = store.versions(name)
    newest = store.version(name, versions[-1])
    return ModelSummary(
        id=name,
        created=int((newest.folder / "manifest.json").stat().st_mtime),
        versions=versions,
        aliases=aliases,
    )


def _describe(store: ModelStore, live: LiveModels, name: str) -> ModelDescription:
    summary = _summary(store, name)
    number = summary.aliases.get(PRODUCTION)
    production = None
    if number is not None:
        production = described_version(store, live, name, number)
    failures = {number: live.loads.failure((name, number)) for number in summary.versions}
    failed = {number: reason for number, reason in failures.items() if reason}
    return ModelDescription(**summary.model_dump(), production=production, failed=failed)


def described_version(
    store: ModelStore, live: LiveModels, name: str, number: int
) -> VersionDescription:
    """What one version says of itself; reads the disk."""
    manifest = store.version(name, number).manifest()
    return _version(number, manifest, _live(live, name, number))


def _live(live: LiveModels, name: str, number: int) -> Predictor | None:
    found = (one for one in live.loaded() if (one.name, one.version) == (name, number))
    return next(found, None)


def _version(number: int, manifest: Manifest, live: Predictor | None) -> VersionDescription:
    return VersionDescription(
        version=number,
        digest=manifest.digest,
        created=int(manifest.created.timestamp()),
        network=manifest.network,
        labels=list(manifest.labels),
        input_shape=list(manifest.preprocessing.input_shape),
        preprocessing=manifest.preprocessing,
        metrics=manifest.metrics,
        lineage=manifest.lineage,
        live=live is not None,
        execution=_execution(live.loaded.execution) if live is not None else None,
        decoding_drift=_drift(live.loaded.drift) if live is not None else None,
    )


def _drift(drift: DecodingDrift | None) -> DriftDescription | None:
    return None if drift is None else DriftDescription(**asdict(drift))


def _execution(execution: Execution) -> ExecutionDescription:
    return ExecutionDescription(
        form=execution.form.name,
        compiled=sorted(execution.compiled),
        trials=[TrialDescription(**asdict(trial)) for trial in execution.trials],
    )
