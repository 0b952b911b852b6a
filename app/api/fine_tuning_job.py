"""Jobs, events and checkpoints of fine-tuning as OpenAI's client reads them, and more."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, Field

from app.errors import BadInput
from app.jobs.attempt_folder import newest_attempt
from app.jobs.job import Event, Job, Kind, State

MAX_CHECKPOINTS: Final = 1000
_FOLDS: Final = "folds"


class FineTuningJob(BaseModel):
    """A job as it stands."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None = Field(description="Of the phase that runs; a guess.")
    model: str = Field(description="The base, by its exact name.")
    fine_tuned_model: str | None = Field(description="The version that was published.")
    organization_id: str = "local"
    status: State
    error: dict[str, Any] | None
    hyperparameters: dict[str, Any] = Field(
        description="As they are used: what was `auto` has its value once the job has begun."
    )
    training_file: str
    validation_file: str | None
    result_files: list[str] = []
    trained_tokens: int | None = None
    seed: int
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None
    webhook: str | None = Field(description="The URL of its own that is told of its end.")
    method: dict[str, Any] = Field(description="As it was asked for.")
    suffix: str | None
    name: str = Field(description="The model that the result is a version of.")
    by: str
    started_at: int | None
    attempt: int = Field(description="How many workers have begun it.")
    place: int | None = Field(description="In the queue, from 1, while it is queued.")
    reason: str | None = Field(description="Why it waits, or was paused.")
    asked: str | None = Field(description="`pause` or `stop`, until its worker has done it.")
    progress: dict[str, Any]
    resolved: dict[str, Any] = Field(description="What each `auto` became, and why.")
    metrics: dict[str, Any] | None
    result: dict[str, Any] | None = Field(description="All else that is known of the result.")
    evaluation: dict[str, Any] | None = Field(
        description="How the version compares with the one in production: `status`, `sentence`, "
        "`figures` and `report_url`, a page to look at."
    )
    promotion: dict[str, Any] | None = Field(
        description="`pending`, `promoted`, `refused` or `failed`, where `promote` was given."
    )
    curves_url: str = Field(description="A picture of its training curves, for a browser.")
    tensorboard_url: str = Field(description="Its TensorBoard events, as a zip.")


class FineTuningList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    type: str
    message: str
    data: dict[str, Any]


class FineTuningEvents(BaseModel):
    """Events, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class FineTuningCheckpoint(BaseModel):
    """A state of a run that it could go on from, or the version that it became."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str = Field(
        description="The version, or what a snapshot is called; only versions can be asked."
    )
    step_number: int
    metrics: dict[str, Any]


class FineTuningCheckpoints(BaseModel):
    """Checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None


def job_object(
    job: Job, place: int | None, follower: Job | None, link: Callable[[str], str] = str
) -> FineTuningJob:
    """A job as it is told.

    Args:
        job: of this kind.
        place: how many queued jobs come before it; None unless it is queued.
        follower: the evaluation or promotion that follows it.
        link: makes a path one that a browser may open.
    """
    request, result = job.options.get("request", {}), job.result or {}
    resolved = job.options.get("resolved", {})
    values = {name: choice["value"] for name, choice in resolved.items()}
    method = job.options["method"]
    asked = request.get("hyperparameters", job.options.get("config", {}))
    rest = {k: v for k, v in result.items() if k not in ("metrics", "hyperparameters", "resolved")}
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created),
        finished_at=_seconds(job.finished),
        estimated_finish=_estimated(job),
        model=job.model or "",
        fine_tuned_model=f"{result['model']}:{result['version']}" if result else None,
        status=job.state,
        error=None if job.error is None else asdict(job.error),
        hyperparameters=result.get("hyperparameters") or {**asked, **values},
        training_file=job.dataset or "",
        validation_file=request.get("validation_dataset"),
        seed=request.get("seed", 0),
        metadata=job.options.get("metadata"),
        webhook=job.options.get("webhook"),
        method={"type": method, method: {"hyperparameters": asked}},
        suffix=job.options.get("suffix"),
        name=job.options["name"],
        by=job.by,
        started_at=_seconds(job.started),
        attempt=job.attempt,
        place=None if place is None else place + 1,
        reason=_reason(job, place),
        asked=job.request,
        progress=dict(job.progress),
        resolved=resolved,
        metrics=result.get("metrics"),
        result=rest or None,
        evaluation=_evaluation(job, follower, link),
        promotion=_promotion(job, follower),
        curves_url=link(f"/v1/fine_tuning/jobs/{job.id}/curves"),
        tensorboard_url=link(f"/v1/fine_tuning/jobs/{job.id}/tensorboard"),
    )


def event_object(event: Event) -> FineTuningEvent:
    """An event as it is told."""
    return FineTuningEvent(
        id=f"ftevent-{event.job_id}-{event.sequence}",
        created_at=int(event.time),
        level=event.level,
        type=event.type,
        message=event.message,
        data=dict(event.data),
    )


def sequence_of(event_id: str, param: str) -> int:
    """The number in an event's id; a number alone is one, too.

    Raises:
        BadInput: there is none.
    """
    text = event_id.rpartition("-")[2]
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise BadInput(f"{event_id[:80]!r} is no id of an event", param=param)
    return int(text)


def checkpoints_of(job: Job, run: Path, epochs: Sequence[Event]) -> list[FineTuningCheckpoint]:
    """The version, then the snapshots that lie in the run's folder, newest first."""
    found = [] if job.result is None else [_published(job)]
    attempt = newest_attempt(run)
    if attempt is None or job.is_final:
        return found
    snapshots = [path for path in attempt.glob("**/step-*") if _FOLDS not in path.parts]
    made = sorted(((_made(path), path) for path in snapshots), reverse=True)
    return found + [_snapshot(job, path, at, epochs) for at, path in made[:MAX_CHECKPOINTS]]


def _published(job: Job) -> FineTuningCheckpoint:
    result = job.result or {}
    version = f"{result['model']}:{result['version']}"
    best = result.get("best", {})
    step = int(best.get("step", 0))
    metrics = {"step": step, "train_loss": best.get("loss")}
    if best.get("validation_loss") is not None:
        metrics |= {"valid_loss": best["validation_loss"]}
        metrics |= {"valid_mean_token_accuracy": best["validation_accuracy"]}
    return FineTuningCheckpoint(
        id=f"ftckpt-{job.id}-version",
        created_at=int(job.finished or job.created),
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=version,
        step_number=step,
        metrics={**metrics, **result.get("metrics", {})},
    )


def _snapshot(job: Job, path: Path, made: float, epochs: Sequence[Event]) -> FineTuningCheckpoint:
    step, phase = int(path.name.removeprefix("step-")), path.parent.name
    before = [one.data for one in epochs if one.data.get("step", 0) <= step]
    newest: Mapping[str, Any] = before[-1] if before else {}
    return FineTuningCheckpoint(
        id=f"ftckpt-{job.id}-{phase}-{step}",
        created_at=int(made),
        fine_tuning_job_id=job.id,
        fine_tuned_model_checkpoint=f"{job.id}:{phase}:step-{step}",
        step_number=step,
        metrics={
            "step": step,
            "valid_loss": newest.get("loss"),
            "valid_mean_token_accuracy": newest.get("accuracy"),
        },
    )


def _made(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _estimated(job: Job) -> int | None:
    left = job.progress.get("seconds_left")
    if job.state is not State.RUNNING or left is None:
        return None
    return int(time.time() + left)


def _reason(job: Job, place: int | None) -> str | None:
    if place:
        return f"{place} job{'s' if place > 1 else ''} wait before it"
    if job.state is State.QUEUED:
        return job.reason or "it begins as soon as a worker is free"
    return job.reason if job.state is State.PAUSED else None


def _evaluation(
    job: Job, follower: Job | None, link: Callable[[str], str]
) -> dict[str, Any] | None:
    """What the evaluation found that follows the job, or that its promotion rests on."""
    if follower is None:
        is_to_come = Kind.EVALUATION in job.options and not job.is_final
        return {"status": "pending"} if is_to_come else None
    told: dict[str, Any] = {"id": follower.id, "status": follower.state}
    found = follower.result or {}
    if "figures" in found:
        told |= {name: found.get(name) for name in ("sentence", "figures")}
        told["report_url"] = link(f"/v1/evaluations/{follower.id}/report")
    elif follower.error is not None:
        told["sentence"] = follower.error.message
    return told


def _promotion(job: Job, follower: Job | None) -> dict[str, Any] | None:
    asked = job.options.get("promotion")
    if asked is None:
        return None
    told: dict[str, Any] = {"alias": asked["proposal"]["alias"], "rule": asked["proposal"]["rule"]}
    if follower is None:
        has_ended = job.is_final and job.state is not State.SUCCEEDED
        return {**told, "status": "none" if has_ended else "pending"}
    told |= {"id": follower.id, "status": "pending"}
    if follower.state is State.SUCCEEDED:
        found = (follower.result or {})["promotion"]
        told |= {"status": "promoted" if found["promoted"] else "refused"}
        told |= {"sentence": found["sentence"], "checks": found["checks"]}
    elif follower.is_final:
        error = follower.error
        told |= {"status": "failed", "sentence": error.message if error else "it was cancelled"}
    return told
