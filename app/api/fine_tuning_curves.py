"""`/v1/fine_tuning/jobs/{id}/curves` and `/tensorboard`: how a run went, for eyes and for tools."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import fastapi
from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from app.api.curves import curves_of, curves_picture
from app.api.page_template import CONTENT_POLICY
from app.api.permission import requires_or_signed
from app.api.schema import error_answers
from app.api.zip_stream import zipped
from app.errors import JobUnknown, NotFound
from app.jobs.job import Job, Kind
from app.jobs.store import JobStore
from training.events import EVENTS

MAX_EVENTS: Final = 4000
"""So many are drawn; of more, one of so many."""
SVG: Final = "image/svg+xml"
LOOKS: Final = [requires_or_signed("finetune")]
Id = Annotated[str, fastapi.Path(description="Id of the job.", max_length=80)]


def curves_routes(jobs: JobStore, home: Path) -> APIRouter:
    """The routes that show a run's curves."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs/{job_id}", tags=["fine-tuning"])
    reading = error_answers(400, 404, 422, 500, 503)

    @router.get(
        "/curves",
        summary="Look at the training curves of a job: one picture, also while it runs.",
        dependencies=LOOKS,
        response_class=Response,
        responses={200: {"content": {SVG: {"example": "<svg/>"}}}, **reading},
    )
    async def show_curves(job_id: Id) -> Response:
        picture = await asyncio.to_thread(_picture, jobs, job_id)
        headers = {"Content-Security-Policy": CONTENT_POLICY, "Cache-Control": "no-store"}
        return Response(picture, media_type=SVG, headers=headers)

    @router.get(
        "/tensorboard",
        summary="Download the TensorBoard events of a job as a zip.",
        dependencies=LOOKS,
        response_class=Response,
        responses={200: {"content": {"application/zip": {}}}, **reading},
    )
    async def download_tensorboard(job_id: Id) -> Response:
        job = await asyncio.to_thread(_job, jobs, job_id)
        folder = home / "runs" / job.id / EVENTS
        if not await asyncio.to_thread(folder.is_dir):
            raise NotFound(f"job {job.id} has written no TensorBoard events")
        headers = {"Content-Disposition": f'attachment; filename="{job.id}-tensorboard.zip"'}
        return StreamingResponse(
            zipped(_opened(job, folder)), media_type="application/zip", headers=headers
        )

    return router


def _job(jobs: JobStore, job_id: str) -> Job:
    job = jobs.get(job_id)
    if job.kind is not Kind.FINE_TUNING:
        raise JobUnknown(f"{job_id} is no fine-tuning job")
    return job


def _picture(jobs: JobStore, job_id: str) -> str:
    job = _job(jobs, job_id)
    events, is_whole = jobs.metrics(job_id, most=MAX_EVENTS)
    return curves_picture(job, curves_of(events), is_whole=is_whole)


def _opened(job: Job, folder: Path) -> Iterator[tuple[str, BinaryIO]]:
    """In a folder by the job's name, which is what TensorBoard calls the run."""
    for path in sorted(folder.iterdir()):
        yield f"{job.id}/{path.name}", path.open("rb")
