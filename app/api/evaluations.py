"""`/v1/evaluations`: versions measured on labelled samples, and the gate that moves an alias.

The samples are a dataset that is here, or come with the request. Small evaluations answer at once,
larger ones are jobs: 202, and `Location` says where to ask.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from app.api.dataset_intake import Intake
from app.api.evaluation_page import evaluation_page
from app.api.evaluation_schema import (
    EXAMPLE,
    PROMOTED,
    Calibration,
    Deleted,
    EvaluationList,
    EvaluationObject,
    EvaluationRequest,
    Id,
    PromotionRequest,
    Versions,
    Wanted,
)
from app.api.evaluation_upload import BODY, is_form, receive_samples
from app.api.json_body import read_json
from app.api.page_template import CONTENT_POLICY
from app.api.permission import key_name, requires, requires_or_signed, signed_link
from app.api.schema import error_answers, shown
from app.errors import BadInput, JobConflict, JobUnknown, NotFound, NotPromoted, refusal_of, v1_body
from app.evaluation.question import Question
from app.examiner import KINDS, Examiner, options_of
from app.jobs.job import Job, Kind, NewJob, State
from models.store import ModelStore
from training.builtin import NAMES
from training.publish import with_temperature

DATASET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class EvaluationLimits(BaseModel):
    """Bounds of these routes.

    Attributes:
        wait_s: how long a request waits for its evaluation if it does not say.
        datasets: the folder of uploaded datasets.
        data_root: the folder of built-in ones.
    """

    wait_s: float
    datasets: Path
    data_root: Path


_LATER: Final[dict[int | str, dict[str, Any]]] = {
    202: {"description": "It goes on as a job; `Location` says where to ask."}
}
_CREATING: Final = error_answers(400, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507)
_READING: Final = error_answers(400, 404, 422, 500, 503)


def evaluation_routes(
    examiner: Examiner, store: ModelStore, intake: Intake, limits: EvaluationLimits
) -> APIRouter:
    """The routes about evaluations, and the gate."""
    router = APIRouter(tags=["evaluations"])
    _add_creation(router, examiner, store, intake, limits)
    _add_reading(router, examiner)
    _add_changes(router, examiner, store)
    _add_gate(router, examiner, store, limits)
    return router


def _add_creation(
    router: APIRouter,
    examiner: Examiner,
    store: ModelStore,
    intake: Intake,
    limits: EvaluationLimits,
) -> None:
    @router.post(
        "/v1/evaluations",
        summary="Measure a version on labelled samples, or compare two.",
        responses={**shown(EXAMPLE), **_LATER, **_CREATING},
        dependencies=[requires("evaluate")],
        openapi_extra=BODY,
        response_model=EvaluationObject,
    )
    async def create_evaluation(
        request: Request,
        response: Response,
        idempotency_key: Annotated[
            str | None,
            Header(max_length=200, description="The same key gives the same evaluation again."),
        ] = None,
    ) -> EvaluationObject:
        wanted: Versions
        if is_form(request):
            wanted, stored = await receive_samples(request, intake, examiner.uploads, store)
            samples = Samples(stored.id, str(stored.folder), stored.manifest.name)
        else:
            wanted = read = await read_json(request, EvaluationRequest)
            samples = await asyncio.to_thread(_found, read.dataset, limits)
        named = [str(await asyncio.to_thread(store.resolve, one)) for one in wanted.versions()]
        question = _question(wanted, samples, limits, *named)
        job = await examiner.create(
            NewJob(
                Kind.EVALUATION,
                options_of(question),
                by=key_name(request.scope),
                idempotency_key=idempotency_key,
                model=named[0],
                dataset=samples.id,
            ),
            limits.wait_s if wanted.wait_s is None else wanted.wait_s,
        )
        return await _answered(examiner, job, request, response)


def _add_reading(router: APIRouter, examiner: Examiner) -> None:
    @router.get(
        "/v1/evaluations",
        summary="List evaluations, newest first.",
        responses={
            **shown({"object": "list", "data": [EXAMPLE], "has_more": False}),
            **_READING,
        },
        dependencies=[requires("evaluate")],
    )
    async def list_evaluations(
        request: Request,
        after: Annotated[
            str | None, Query(description="The last id that was seen.", max_length=80)
        ] = None,
        limit: Annotated[int, Query(ge=1, le=100, description="How many at most.")] = 20,
        kind: Annotated[
            Literal["evaluation", "promotion"], Query(description="Which of the two.")
        ] = "evaluation",
    ) -> EvaluationList:
        jobs, more = await asyncio.to_thread(
            examiner.jobs.list, Kind(kind), after=after, limit=limit
        )
        return EvaluationList(data=[_object(job, None, request) for job in jobs], has_more=more)

    @router.get(
        "/v1/evaluations/{evaluation}",
        summary="Describe one evaluation: how it stands, and what it found.",
        responses={**shown(EXAMPLE), **_READING},
        dependencies=[requires("evaluate")],
    )
    async def describe_evaluation(evaluation: Id, request: Request) -> EvaluationObject:
        return await _described(examiner, await _job(examiner, evaluation), request)

    @router.get(
        "/v1/evaluations/{evaluation}/report",
        summary="Look at an evaluation: one page with every figure and the worst mistakes.",
        responses={200: {"content": {"text/html": {"example": "<!doctype html>"}}}, **_READING},
        dependencies=[requires_or_signed("evaluate")],
        response_class=HTMLResponse,
    )
    async def show_report(evaluation: Id) -> HTMLResponse:
        job = await _job(examiner, evaluation)
        found = await examiner.read(job.id)
        facts = {
            "id": job.id,
            "created": int(job.created),
            "by": job.by,
            "promotion": found.get("promotion"),
        }
        page = await asyncio.to_thread(evaluation_page, found, facts)
        return HTMLResponse(page, headers={"Content-Security-Policy": CONTENT_POLICY})


def _add_changes(router: APIRouter, examiner: Examiner, store: ModelStore) -> None:
    @router.post(
        "/v1/evaluations/{evaluation}/cancel",
        summary="End an evaluation that waits or runs.",
        responses={**shown({**EXAMPLE, "status": "cancelled", "result": None}), **_CREATING},
        dependencies=[requires("evaluate")],
    )
    async def cancel_evaluation(evaluation: Id, request: Request) -> EvaluationObject:
        job = await _job(examiner, evaluation)
        return _object(await examiner.cancel(job.id, key_name(request.scope)), None, request)

    @router.delete(
        "/v1/evaluations/{evaluation}",
        summary="Delete an evaluation that has ended, with its report.",
        responses={
            **shown({"id": EXAMPLE["id"], "object": "evaluation", "deleted": True}),
            **_CREATING,
        },
        dependencies=[requires("evaluate")],
    )
    async def delete_evaluation(evaluation: Id) -> Deleted:
        job = await _job(examiner, evaluation)
        if not job.is_final:
            raise JobConflict(f"{job.id} is {job.state}; cancel it first")
        await asyncio.to_thread(examiner.documents.delete, job.id)
        await asyncio.to_thread(examiner.jobs.delete, job.id)
        return Deleted(id=job.id, object=_kind(job))

    @router.post(
        "/v1/evaluations/{evaluation}/calibrate",
        summary="Publish the evaluated version anew, with the temperature that was fitted.",
        responses={
            **shown({"model": "digits", "version": 3, "temperature": 1.21}),
            **_CREATING,
        },
        dependencies=[requires("models:write")],
    )
    async def calibrate(evaluation: Id, request: Request) -> Calibration:
        job = await _job(examiner, evaluation)
        found = await examiner.read(job.id)
        fitted = found["report"]["temperature"]
        if fitted is None:
            raise BadInput(f"{job.id} fitted no temperature: its samples do not determine one")
        version = await asyncio.to_thread(
            with_temperature,
            store,
            store.version(found["model"], found["version"]),
            fitted["value"],
            source=job.id,
            dataset=found["dataset"]["name"],
            by=key_name(request.scope),
        )
        return Calibration(model=version.name, version=version.number, temperature=fitted["value"])


def _add_gate(
    router: APIRouter, examiner: Examiner, store: ModelStore, limits: EvaluationLimits
) -> None:
    @router.post(
        "/v1/models/{model}/aliases/{alias}/promote",
        summary="Move an alias to a version if it is better by a rule.",
        responses={**shown(PROMOTED), **_LATER, **_CREATING},
        dependencies=[requires("models:activate")],
        response_model=EvaluationObject,
    )
    async def promote_version(
        wanted: PromotionRequest,
        request: Request,
        response: Response,
        model: Annotated[str, PathParameter(description="Name of the model.", examples=["digits"])],
        alias: Annotated[
            str, PathParameter(description="The alias to move.", examples=["production"])
        ],
        idempotency_key: Annotated[
            str | None,
            Header(max_length=200, description="The same key gives the same promotion again."),
        ] = None,
    ) -> Any:
        version = await asyncio.to_thread(store.version, model, wanted.version)
        held = (await asyncio.to_thread(store.aliases, model)).get(alias)
        if held == wanted.version:
            raise NotPromoted(f"{model}@{alias} holds version {held} already")
        samples = await asyncio.to_thread(_found, wanted.dataset, limits)
        question = _question(wanted, samples, limits, str(version))
        proposal = {
            "name": model,
            "alias": alias,
            "version": wanted.version,
            "rule": wanted.rule.model_dump(exclude_none=True),
        }
        job = await examiner.create(
            NewJob(
                Kind.PROMOTION,
                options_of(question, proposal),
                by=key_name(request.scope),
                idempotency_key=idempotency_key,
                model=str(version),
                dataset=wanted.dataset,
            ),
            limits.wait_s if wanted.wait_s is None else wanted.wait_s,
        )
        answer = await _answered(examiner, job, request, response)
        if answer.promotion is None or answer.promotion["promoted"]:
            return answer
        refusal = refusal_of(NotPromoted(answer.promotion["sentence"], param="rule"))
        body = {**v1_body(refusal), "promotion": answer.promotion, "id": answer.id}
        return JSONResponse({**body, "report_url": answer.report_url}, refusal.status)


@dataclass(frozen=True, slots=True)
class Samples:
    """What is measured on: the id of the dataset, where it lies, and what a person calls it."""

    id: str
    path: str
    shown_as: str


def _found(dataset: str, limits: EvaluationLimits) -> Samples:
    """The samples of a dataset that was uploaded, or is built in.

    Raises:
        NotFound: there is no such dataset. A path is never taken for one.
    """
    if dataset in NAMES:
        return Samples(dataset, dataset, dataset)
    folder = limits.datasets / dataset
    if not DATASET.fullmatch(dataset) or not folder.is_dir():
        known = ", ".join(NAMES)
        raise NotFound(
            f"there is no dataset {dataset[:80]!r}; upload one, or take one of {known}",
            param="dataset",
        )
    return Samples(dataset, str(folder), dataset)


def _question(
    wanted: Wanted,
    samples: Samples,
    limits: EvaluationLimits,
    model: str,
    compare_to: str | None = None,
) -> Question:
    return Question(
        model=model,
        dataset=samples.path,
        shown_as=samples.shown_as,
        compare_to=compare_to,
        part=wanted.part,
        leave_out_seen=getattr(wanted, "leave_out_seen", None),
        top_k=tuple(sorted(set(wanted.top_k))),
        data_root=str(limits.data_root),
    )


async def _job(examiner: Examiner, evaluation: str) -> Job:
    job = await asyncio.to_thread(examiner.jobs.get, evaluation)
    if job.kind not in KINDS:
        raise JobUnknown(f"{evaluation} is no evaluation")
    return job


async def _answered(
    examiner: Examiner, job: Job, request: Request, response: Response
) -> EvaluationObject:
    """The evaluation; 202 while it is not finished."""
    if not job.is_final:
        response.status_code = 202
        response.headers["Location"] = f"/v1/evaluations/{job.id}"
    return await _described(examiner, job, request)


async def _described(examiner: Examiner, job: Job, request: Request) -> EvaluationObject:
    found = None
    if job.state is State.SUCCEEDED:
        found = await asyncio.to_thread(examiner.documents.read, job.id)
    return _object(job, found, request)


def _object(job: Job, found: Mapping[str, Any] | None, request: Request) -> EvaluationObject:
    question, result = job.options["question"], job.result or {}
    shown_result = None
    if found is not None:
        shown_result = {
            key: value for key, value in found.items() if key not in ("thumbnails", "promotion")
        }
    elif "figures" in result:
        shown_result = {"figures": result["figures"]}
    error = job.error
    return EvaluationObject(
        id=job.id,
        object=_kind(job),
        status=job.state,
        model=job.model,
        compare_to=question["compare_to"],
        dataset=job.dataset,
        created_at=int(job.created),
        finished_at=None if job.finished is None else int(job.finished),
        by=job.by,
        progress=dict(job.progress),
        error=None if error is None else asdict(error),
        result=shown_result,
        promotion=result.get("promotion"),
        report_url=signed_link(request, f"/v1/evaluations/{job.id}/report")
        if "figures" in result
        else None,
    )


def _kind(job: Job) -> Literal["evaluation", "promotion"]:
    return "promotion" if job.kind is Kind.PROMOTION else "evaluation"
