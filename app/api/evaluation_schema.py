"""What `/v1/evaluations` and the gate take and answer, with worked examples."""

from typing import Annotated, Any, Final, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from app.api.schema import EMPTY
from app.evaluation.rule import Rule
from app.jobs.job import State

MAX_TOP_K: Final = 10
_FIGURES: Final = {
    "accuracy": 0.9832,
    "accuracy_interval": [0.9519, 0.9943],
    "top_k": {"1": 0.9832, "3": 1.0},
    "calibration_error": 0.0121,
}
EXAMPLE: Final = {
    "id": "eval-5f2c8a1d9b3e4f60718293a4",
    "object": "evaluation",
    "status": "succeeded",
    "model": "digits:2",
    "compare_to": "digits:1",
    "dataset": "digits",
    "created_at": 1795396800,
    "finished_at": 1795396801,
    "by": "local",
    "progress": {"done": 179, "total": 179},
    "error": None,
    "result": {
        "model": "digits",
        "version": 2,
        "num_samples": 179,
        "num_left_out": 0,
        "report": _FIGURES,
        "comparison": {"num_gained": 31, "num_lost": 2, "p_value": 1.3e-07},
        "worst_mistakes": [{"name": "sample 812", "target": "8", "predicted": "1", "loss": 3.1}],
    },
    "report_url": "/v1/evaluations/eval-5f2c8a1d9b3e4f60718293a4/report",
}
PROMOTED: Final = {
    **{key: value for key, value in EXAMPLE.items() if key != "result"},
    "id": "promotion-5f2c8a1d9b3e4f60718293a4",
    "object": "promotion",
    "promotion": {
        "model": "digits",
        "alias": "production",
        "version": 2,
        "previous": 1,
        "promoted": True,
        "sentence": "accuracy 0.9832 against 0.8212 is +0.1620, +0 wanted",
    },
}
Id = Annotated[
    str,
    Path(description="Id of an evaluation or a promotion.", max_length=80),
]


Dataset = Annotated[
    str,
    Field(
        description="The id of an uploaded dataset, or digits, mnist, fashion-mnist, cifar10.",
        examples=["digits"],
        max_length=64,
    ),
]


class Wanted(BaseModel):
    """What evaluations and promotions have in common."""

    model_config = ConfigDict(extra="forbid")

    part: Literal["train", "validation", "test"] | None = Field(
        None, description="The part to measure on; test, else validation, else all, if not given."
    )
    top_k: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(
        default_factory=lambda: [1, 3, 5],
        min_length=1,
        max_length=MAX_TOP_K,
        description="The k for which the share of samples is wanted whose class is among the k "
        "most probable.",
    )
    wait_s: float | None = Field(
        None,
        ge=0,
        le=300,
        description="How long to wait for the end before the answer is 202; 0 never waits.",
    )


class Versions(Wanted):
    """A version, and maybe one to compare with."""

    model: str = Field(
        description="`digits`, `digits@alias` or `digits:3`.",
        json_schema_extra={"example": "digits"},
        max_length=200,
    )
    compare_to: str | None = Field(
        None,
        description="Another version, named the same way.",
        json_schema_extra=EMPTY,
        max_length=200,
    )
    leave_out_seen: bool | None = Field(
        None,
        description="Whether samples are left out that a version was trained or selected on; if "
        "not given, they are where two versions are compared.",
    )

    def versions(self) -> list[str]:
        """As they were named."""
        return [self.model, *([self.compare_to] if self.compare_to else [])]


class EvaluationRequest(Versions):
    """A version, samples that are here, and maybe a version to compare with."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "digits", "dataset": "digits"}}
    )

    dataset: Dataset


class PromotionRequest(Wanted):
    """A candidate, samples, and the rule that must hold."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"version": 2, "dataset": "digits", "rule": {"min_absolute_change": 0}}
        }
    )

    dataset: Dataset
    version: int = Field(ge=1, description="Number of the candidate.", examples=[2])
    rule: Rule


class EvaluationObject(BaseModel):
    """An evaluation or a promotion as it stands."""

    id: str
    object: Literal["evaluation", "promotion"]
    status: State
    model: str | None
    compare_to: str | None
    dataset: str | None
    created_at: int
    finished_at: int | None
    by: str
    progress: dict[str, Any]
    error: dict[str, Any] | None
    result: dict[str, Any] | None = Field(
        None, description="What was found, once it has succeeded; in lists the figures alone."
    )
    promotion: dict[str, Any] | None = Field(
        None, description="Of a promotion: whether the alias moved, and every part of the rule."
    )
    report_url: str | None = Field(None, description="The page to look at.")


class EvaluationList(BaseModel):
    """Evaluations, newest first."""

    object: Literal["list"] = "list"
    data: list[EvaluationObject]
    has_more: bool


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: Literal["evaluation", "promotion"]
    deleted: Literal[True] = True


class Calibration(BaseModel):
    """The version with the fitted temperature."""

    model: str
    version: int
    temperature: float
