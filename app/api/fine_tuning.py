"""`/v1/fine_tuning`: jobs that make a version from a base and a dataset, in OpenAI's shapes."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from app.api.event_stream import EventStreams
from app.api.fine_tuning_job import (
    FineTuningCheckpoints,
    FineTuningEvents,
    FineTuningJob,
    FineTuningList,
    checkpoints_of,
    event_object,
    job_object,
    sequence_of,
)
from app.api.fine_tuning_request import JobRequest, Places, job_options, wanted_metadata
from app.api.permission import Gate, key_name, requires, signed_link
from app.api.schema import error_answers, shown
from app.errors import BadInput, JobUnknown, NotFound, Overloaded
from app.jobs.courier import Courier
from app.jobs.job import Event, Job, Kind, NewJob, State
from app.jobs.runner import Runner, follower_key
from app.jobs.store import MAX_COUNTED, JobStore
from models.store import ModelStore
from training.methods import schemas

SSE: Final = "text/event-stream"
MAX_EPOCHS_READ: Final = 1000
_ID: Final = "ftjob-5f2c8a1d9b3e4f60718293a4"
_JOB: Final = {
    "id": _ID,
    "object": "fine_tuning.job",
    "created_at": 1795396800,
    "finished_at": 1795396860,
    "estimated_finish": None,
    "model": "mobilenet:1",
    "fine_tuned_model": "parts:1",
    "organization_id": "local",
    "status": "succeeded",
    "error": None,
    "hyperparameters": {"epochs": 100, "batch_size": 32, "learning_rate": 0.002},
    "training_file": "dset-6730e52205eb541f8a97d7e3",
    "validation_file": None,
    "result_files": [],
    "trained_tokens": None,
    "seed": 0,
    "integrations": None,
    "metadata": None,
    "webhook": None,
    "method": {"type": "linear_probe", "linear_probe": {"hyperparameters": {}}},
    "suffix": "parts",
    "name": "parts",
    "by": "local",
    "started_at": 1795396802,
    "attempt": 1,
    "place": None,
    "reason": None,
    "asked": None,
    "progress": {"phase": "epoch", "step": 800, "num_steps": 800},
    "resolved": {"epochs": {"value": 100, "reason": "passes over features cost next to nothing"}},
    "metrics": {"accuracy": 0.96},
    "result": {"model": "parts", "version": 1, "measured_on": "validation"},
    "evaluation": {
        "id": "eval-5f2c8a1d9b3e4f60718293a4",
        "status": "succeeded",
        "sentence": "96.1% of 153 samples right, between 91.7% and 98.2% with 95 % confidence; "
        "about 1,500 samples would be enough to know it within one point.",
        "figures": {"accuracy": 0.961},
        "report_url": "/v1/evaluations/eval-5f2c8a1d9b3e4f60718293a4/report",
    },
    "promotion": None,
    "curves_url": f"/v1/fine_tuning/jobs/{_ID}/curves",
    "tensorboard_url": f"/v1/fine_tuning/jobs/{_ID}/tensorboard",
}
_EVENT: Final = {
    "id": f"ftevent-{_ID}-7",
    "object": "fine_tuning.job.event",
    "created_at": 1795396812,
    "level": "info",
    "type": "metrics",
    "message": "epoch 3, step 24",
    "data": {"phase": "epoch", "step": 24, "loss": 0.41, "accuracy": 0.94},
}
_CHECKPOINT: Final = {
    "id": f"ftckpt-{_ID}-version",
    "object": "fine_tuning.job.checkpoint",
    "created_at": 1795396860,
    "fine_tuning_job_id": _ID,
    "fine_tuned_model_checkpoint": "parts:1",
    "step_number": 800,
    "metrics": {"step": 800, "train_loss": 0.1, "accuracy": 0.96},
}
_BASE: Final = {
    "base": "digits:1",
    "kind": "version",
    "network": "cnn",
    "parameters": 12345,
    "size_bytes": 49380,
    "input_shape": [1, 8, 8],
    "num_classes": 10,
    "licence": "trained here from fresh weights: the terms of its dataset are yours to know",
}
_METADATA: Final = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "description": "Only jobs with these metadata: `metadata[team]=vision`.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
_METHOD: Final = {
    "id": "linear_probe",
    "object": "fine_tuning.method",
    "schema": {
        "type": "object",
        "properties": {"epochs": {"anyOf": [{"type": "integer"}, {"const": "auto"}]}},
    },
}


class DryRun(BaseModel):
    """What a job would do."""

    object: Literal["fine_tuning.dry_run"] = "fine_tuning.dry_run"
    model: str
    name: str
    method: str
    resolved: dict[str, Any] = Field(description="What each `auto` would become, and why.")
    hyperparameters: dict[str, Any]
    num_samples: int
    classes: list[str]
    memory_bytes: int
    seconds_per_epoch: float = Field(description="Over pictures.")
    backbone_seconds: float = Field(description="One pass, for features.")
    seconds: float = Field(description="All of it, roughly.")
    measured: str
    warnings: list[str]


class MethodList(BaseModel):
    """The methods and their hyperparameters."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class BaseList(BaseModel):
    """What can be tuned here."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


TUNES: Final = [requires("finetune")]
_READING: Final = error_answers(400, 404, 422, 500, 503)
_CHANGING: Final = error_answers(400, 403, 404, 409, 422, 429, 500, 503)
Id = Annotated[str, Path(description="Id of the job.", max_length=80)]
After = Annotated[str | None, Query(description="The last id that was seen.", max_length=120)]
Limit = Annotated[int, Query(ge=1, le=100, description="How many at most.")]


class Desk:
    """What the routes need of this server.

    Args:
        jobs: the rows.
        runner: of this process; told when there is something to look at.
        store: of models.
        places: where names are looked up.
        streams: of events.
        courier: delivers webhooks; None where they are off.
    """

    def __init__(
        self,
        jobs: JobStore,
        runner: Runner,
        store: ModelStore,
        places: Places,
        streams: EventStreams,
        courier: Courier | None,
    ) -> None:
        self.jobs, self.runner, self.store = jobs, runner, store
        self.places, self.streams, self._courier = places, streams, courier
        self._measuring = threading.Lock()

    def create(self, wanted: JobRequest, by: str, key: str | None) -> Job:
        """The job of a request; the one that the key made before, whatever has changed since."""
        known = self.jobs.find(by, key) if key is not None else None
        options = known.options if known else self._options(wanted)
        base = options.get("request", {}).get("base")
        new = NewJob(Kind.FINE_TUNING, options, by, key, base, wanted.training_file)
        return self.jobs.create(new, fingerprint=wanted.fingerprint)

    def dry_run(self, wanted: JobRequest) -> DryRun:
        """What would happen; one at a time, because it computes.

        Raises:
            Overloaded: another one is being answered.
            BadInput: the base and the dataset do not fit.
        """
        options = self._options(wanted)
        if not self._measuring.acquire(blocking=False):
            raise Overloaded("another dry run is being measured; try again", retry_after_s=5.0)
        try:
            return self._measured(options)
        finally:
            self._measuring.release()

    def get(self, job_id: str) -> Job:
        """One job of this kind.

        Raises:
            JobUnknown: there is none.
        """
        job = self.jobs.get(job_id)
        if job.kind is not Kind.FINE_TUNING:
            raise JobUnknown(f"{job_id} is no fine-tuning job")
        return job

    def told(self, job: Job, request: Request, place: int | None = None) -> FineTuningJob:
        """As it is answered to `request`, whose key the links carry on."""
        if place is None and job.state is State.QUEUED:
            place = self.jobs.place(job)
        follower = None
        if job.state is State.SUCCEEDED:
            follower = self.jobs.find(job.by, follower_key(job.id))
        return job_object(job, place, follower, lambda path: signed_link(request, path))

    def page(self, after: str | None, limit: int, request: Request) -> FineTuningList:
        """Jobs, newest first."""
        metadata = wanted_metadata(request.query_params.multi_items())
        jobs, more = self.jobs.list(Kind.FINE_TUNING, after=after, limit=limit, metadata=metadata)
        places = {} if metadata else self._places(jobs)
        told = [self.told(job, request, places.get(job.id)) for job in jobs]
        return FineTuningList(data=told, has_more=more)

    def _places(self, jobs: Sequence[Job]) -> dict[str, int]:
        """Of the queued ones of a page without gaps, newest first: only the oldest is counted."""
        waiting = [job for job in reversed(jobs) if job.state is State.QUEUED]
        first = self.jobs.place(waiting[0]) if waiting else 0
        return {job.id: min(first + n, MAX_COUNTED) for n, job in enumerate(waiting)}

    def events(self, job_id: str, after: str | None, limit: int) -> FineTuningEvents:
        """Events, newest first, older than `after`."""
        before = None if after is None else sequence_of(after, "after")
        found, more = self.jobs.newest_events(self.get(job_id).id, before=before, limit=limit)
        return FineTuningEvents(data=[event_object(one) for one in found], has_more=more)

    def checkpoints(self, job_id: str, after: str | None, limit: int) -> FineTuningCheckpoints:
        """Checkpoints, newest first, older than `after`."""
        job = self.get(job_id)
        newest, _ = self.jobs.newest_events(job_id, limit=MAX_EPOCHS_READ)
        epochs: list[Event] = [one for one in reversed(newest) if one.data.get("phase") == "epoch"]
        found = checkpoints_of(job, self.places.home / "runs" / job.id, epochs)
        if after is not None:
            ids = [one.id for one in found]
            if after not in ids:
                raise NotFound(f"there is no checkpoint {after!r} to go on from", param="after")
            found = found[ids.index(after) + 1 :]
        page = found[:limit]
        return FineTuningCheckpoints(
            data=page,
            has_more=len(found) > limit,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
        )

    def _options(self, wanted: JobRequest) -> dict[str, Any]:
        options = job_options(wanted, self.store, self.places)
        if self._courier is not None:
            options["webhooks"] = self._courier.addressees(wanted.webhook)
        elif wanted.webhook is not None:
            raise BadInput(
                "this server sends no webhooks: PYTORCHLIB_WEBHOOK_HOSTS lists no host",
                param="webhook",
            )
        return {**options, "webhook": wanted.webhook}

    def _measured(self, options: dict[str, Any]) -> DryRun:
        from models.checkpoint import CheckpointError
        from training.backbone import BaseUnknown
        from training.estimate import dry_run
        from training.faults import DatasetError
        from training.importing import ImportRefused
        from training.train import NetworkUnfit

        request = dict(options["request"])
        for name in ("dataset", "validation_dataset"):
            if request[name] is not None:
                request[name] = str(self.places.datasets / request[name])
        try:
            found = dry_run(request, self.places.home)
        except (BaseUnknown, DatasetError, ImportRefused, NetworkUnfit, CheckpointError) as error:
            raise BadInput(str(error)) from error
        return DryRun(model=request["base"], name=request["name"], **found)


def fine_tuning_routes(desk: Desk) -> APIRouter:
    """The routes about fine-tuning."""
    router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"])
    _creating(router, desk)
    _reading(router, desk)
    _watching(router, desk)
    _changing(router, desk)
    _offering(router, desk)
    return router


def _creating(router: APIRouter, desk: Desk) -> None:
    @router.post(
        "/jobs",
        summary="Make a new version from a base and a dataset, as a job.",
        description=(
            "OpenAI's shapes: `model` is the base, `training_file` the id of a dataset or file. "
            "What is `auto` is chosen when the job begins, and shown with its reason. With "
            "`dry_run` nothing is created: the answer says what would happen. `promote` also needs "
            "a key with the scope `models:activate`."
        ),
        dependencies=TUNES,
        responses={
            **shown({**_JOB, "status": "queued", "fine_tuned_model": None, "result": None}),
            **error_answers(400, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503),
        },
    )
    async def create_fine_tuning_job(
        wanted: JobRequest,
        request: Request,
        idempotency_key: Annotated[
            str | None, Header(max_length=200, description="The same key gives the same job.")
        ] = None,
    ) -> FineTuningJob | DryRun:
        if wanted.promote is not None:
            gate: Gate = request.app.state.gate
            gate.admit(request.scope, "models:activate")
        if wanted.dry_run:
            return await asyncio.to_thread(desk.dry_run, wanted)
        by = key_name(request.scope)
        job = await asyncio.to_thread(desk.create, wanted, by, idempotency_key)
        desk.runner.nudge()
        return await asyncio.to_thread(desk.told, job, request)


def _reading(router: APIRouter, desk: Desk) -> None:
    @router.get(
        "/jobs",
        summary="List fine-tuning jobs, newest first.",
        openapi_extra={"parameters": [_METADATA]},
        dependencies=TUNES,
        responses={
            **shown({"object": "list", "data": [_JOB], "has_more": False}),
            **_READING,
        },
    )
    async def list_fine_tuning_jobs(
        request: Request, after: After = None, limit: Limit = 20
    ) -> FineTuningList:
        return await asyncio.to_thread(desk.page, after, limit, request)

    @router.get(
        "/jobs/{job_id}",
        summary="Describe one fine-tuning job: how it stands, and what came of it.",
        dependencies=TUNES,
        responses={**shown(_JOB), **_READING},
    )
    async def describe_fine_tuning_job(request: Request, job_id: Id) -> FineTuningJob:
        return await asyncio.to_thread(lambda: desk.told(desk.get(job_id), request))

    @router.get(
        "/jobs/{job_id}/checkpoints",
        summary="List the checkpoints of a fine-tuning job, newest first.",
        dependencies=TUNES,
        responses={
            **shown(
                {
                    "object": "list",
                    "data": [_CHECKPOINT],
                    "has_more": False,
                    "first_id": _CHECKPOINT["id"],
                    "last_id": _CHECKPOINT["id"],
                }
            ),
            **_READING,
        },
    )
    async def list_checkpoints(
        job_id: Id, after: After = None, limit: Limit = 10
    ) -> FineTuningCheckpoints:
        return await asyncio.to_thread(desk.checkpoints, job_id, after, limit)


def _watching(router: APIRouter, desk: Desk) -> None:
    @router.get(
        "/jobs/{job_id}/events",
        summary="List the events of a fine-tuning job, newest first, or follow them as they come.",
        description=(
            "Pages, newest first. With `stream=true` or `Accept: text/event-stream` every event "
            "from the first on, or from behind `Last-Event-ID`, as a server-sent event, until the "
            "job has ended. Who comes back behind the last event of an ended job is answered 204, "
            "on which an `EventSource` stops."
        ),
        dependencies=TUNES,
        responses={
            200: {
                "content": {
                    "application/json": {
                        "example": {"object": "list", "data": [_EVENT], "has_more": True}
                    },
                    SSE: {"example": "id: 7\nevent: metrics\ndata: {...}\n\n"},
                }
            },
            204: {"description": "The job has ended, and there is no event behind that one."},
            **error_answers(400, 404, 422, 429, 500, 503),
        },
        response_model=FineTuningEvents,
    )
    async def list_fine_tuning_events(
        request: Request,
        job_id: Id,
        after: After = None,
        limit: Limit = 20,
        stream: Annotated[bool, Query(description="Whether to follow the events.")] = False,
        last_event_id: Annotated[
            str | None, Header(max_length=120, description="What an `EventSource` saw last.")
        ] = None,
    ) -> Any:
        if not stream and SSE not in request.headers.get("accept", ""):
            return await asyncio.to_thread(desk.events, job_id, after, limit)
        seen = last_event_id or after
        behind = 0 if seen is None else sequence_of(seen, "Last-Event-ID")
        job = await asyncio.to_thread(desk.get, job_id)
        newer, _ = await asyncio.to_thread(desk.jobs.events, job_id, after=behind, limit=1)
        if job.is_final and not newer:
            return Response(status_code=204)
        desk.streams.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            desk.streams.follow(job_id, behind), media_type=SSE, headers=headers
        )


def _changing(router: APIRouter, desk: Desk) -> None:
    async def asked(job_id: str, change: Callable[[str], Job], request: Request) -> FineTuningJob:
        await asyncio.to_thread(desk.get, job_id)
        job = await asyncio.to_thread(change, job_id)
        desk.runner.nudge()
        return await asyncio.to_thread(desk.told, job, request)

    def add(verb: str, summary: str, status: str) -> None:
        change = getattr(desk.jobs, verb)

        async def endpoint(job_id: Id, request: Request) -> FineTuningJob:
            by = key_name(request.scope)
            return await asked(job_id, lambda one: change(one, by=by), request)

        router.add_api_route(
            f"/jobs/{{job_id}}/{verb}",
            endpoint,
            methods=["POST"],
            name=f"{verb}_fine_tuning_job",
            summary=summary,
            dependencies=TUNES,
            responses={
                **shown({**_JOB, "status": status, "fine_tuned_model": None, "result": None}),
                **_CHANGING,
            },
        )

    add("cancel", "End a fine-tuning job and keep nothing of it.", "cancelled")
    add("pause", "Let a fine-tuning job wait, after a snapshot, until it is resumed.", "running")
    add("resume", "Let a paused fine-tuning job go on where it was.", "queued")
    add("stop", "Let a fine-tuning job finish now and publish the best it has.", "running")


def _offering(router: APIRouter, desk: Desk) -> None:
    @router.get(
        "/methods",
        summary="List the methods, each with the JSON Schema of its hyperparameters.",
        dependencies=TUNES,
        responses={
            **shown({"object": "list", "data": [_METHOD]}),
            **error_answers(400, 500, 503),
        },
    )
    async def list_methods() -> MethodList:
        found = schemas().items()
        return MethodList(
            data=[
                {"id": name, "object": "fine_tuning.method", "schema": schema}
                for name, schema in found
            ]
        )

    @router.get(
        "/bases",
        summary="List what can be tuned here, with size, input and licence of each.",
        dependencies=TUNES,
        responses={**shown({"object": "list", "data": [_BASE]}), **error_answers(400, 500, 503)},
    )
    async def list_bases() -> BaseList:
        def found() -> list[dict[str, Any]]:
            from training.bases import bases

            return bases(desk.places.home)

        return BaseList(data=await asyncio.to_thread(found))
