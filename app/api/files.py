"""`/v1/files`: datasets as OpenAI's client sends and reads them."""

import asyncio
import contextlib
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from app.api.dataset_archive import archive_of
from app.api.dataset_intake import Intake, Wanted, told
from app.api.permission import key_name, requires
from app.api.schema import error_answers, shown
from app.errors import BadInput, NotFound, refusal_of, v1_body
from training.dataset_store import DatasetDamaged, DatasetStore, DatasetUnknown, StoredDataset

PURPOSE: Final = "fine-tune"
MAX_PAGE: Final = 10_000
_ID: Final = "dset-6730e52205eb541f8a97d7e3"
_EXAMPLE: Final = {
    "id": _ID,
    "object": "file",
    "bytes": 47185920,
    "created_at": 1795396800,
    "filename": "ants and bees.zip",
    "purpose": PURPOSE,
    "status": "processed",
    "status_details": None,
    "expires_at": None,
}


class File(BaseModel):
    """A dataset as a file."""

    id: str = Field(description="Also the id of the dataset.")
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed", "error"] = Field(
        description="`error` where nothing can be learned from it."
    )
    status_details: str | None = Field(description="What is wrong with it.")
    expires_at: int | None = None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None


SCOPE: Final = [requires("data:write")]
Id = Annotated[str, Path(description="Id of the file.", max_length=64)]


def files_routes(intake: Intake) -> APIRouter:
    """The routes of files."""
    router = APIRouter(prefix="/v1/files", tags=["files"])
    _receiving(router, intake)
    _reading(router, intake.store)
    return router


def _receiving(router: APIRouter, intake: Intake) -> None:
    @router.post(
        "",
        summary="Send a dataset as a file, for OpenAI's client.",
        description=(
            "The same archives as `/v1/datasets`: the id of the file is that of the dataset, whose "
            "report says what was found. A dataset that nothing can be learned from is a 422."
        ),
        dependencies=SCOPE,
        openapi_extra={"requestBody": _FORM},
        responses={
            **shown(_EXAMPLE),
            **error_answers(400, 403, 408, 413, 415, 422, 429, 500, 503, 507),
        },
        response_model=File,
    )
    async def create_file(request: Request) -> Response:
        with intake.place(), told():
            by = key_name(request.scope)
            stored, _ = await intake.receive(request, Wanted("", "", ""), None, by)
        file = _file(stored)
        if file.status == "processed":
            return JSONResponse(file.model_dump(mode="json"))
        refusal = refusal_of(BadInput(str(file.status_details), param="file"))
        return JSONResponse({**v1_body(refusal), "file": file.model_dump(mode="json")}, 422)


def _reading(router: APIRouter, store: DatasetStore) -> None:
    @router.get(
        "",
        summary="List files, newest first.",
        dependencies=SCOPE,
        responses={
            **shown(
                {
                    "object": "list",
                    "data": [_EXAMPLE],
                    "has_more": False,
                    "first_id": _ID,
                    "last_id": _ID,
                }
            ),
            **error_answers(400, 404, 422, 500, 503),
        },
    )
    async def list_files(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most files of a page.")] = 100,
        after: Annotated[
            str | None, Query(max_length=64, description="Id that the page begins behind.")
        ] = None,
        order: Annotated[Literal["asc", "desc"], Query(description="By their age.")] = "desc",
        purpose: Annotated[
            str | None, Query(max_length=64, description="Only `fine-tune` finds any.")
        ] = None,
    ) -> FileList:
        if purpose not in (None, PURPOSE):
            return FileList(data=[], has_more=False, first_id=None, last_id=None)
        return await asyncio.to_thread(_page, store, limit, after, order)

    @router.get(
        "/{file_id}",
        summary="Describe one file.",
        dependencies=SCOPE,
        responses={**shown(_EXAMPLE), **error_answers(400, 404, 409, 422, 500, 503)},
    )
    async def describe_file(file_id: Id) -> File:
        with told():
            return _file(await asyncio.to_thread(store.get, file_id))

    @router.get(
        "/{file_id}/content",
        summary="Download a file: the samples of the dataset as a zip.",
        dependencies=SCOPE,
        response_class=Response,
        responses={
            200: {"content": {"application/zip": {}}},
            **error_answers(400, 404, 409, 422, 500, 503),
        },
    )
    async def download_file(file_id: Id) -> Response:
        with told():
            return archive_of(await asyncio.to_thread(store.get, file_id))

    @router.delete(
        "/{file_id}",
        summary="Delete a file, which is a dataset.",
        dependencies=SCOPE,
        responses={
            **shown({"id": _ID, "object": "file", "deleted": True}),
            **error_answers(400, 403, 404, 422, 500, 503),
        },
    )
    async def delete_file(file_id: Id) -> dict[str, Any]:
        with told():
            await asyncio.to_thread(store.delete, file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _page(store: DatasetStore, limit: int, after: str | None, order: str) -> FileList:
    ids = store.ids() if order == "desc" else store.ids()[::-1]
    if after is not None:
        if after not in ids:
            raise NotFound(f"there is no file {after!r} to go on from", param="after")
        ids = ids[ids.index(after) + 1 :]
    found = []
    for one in ids[:limit]:
        with contextlib.suppress(DatasetUnknown, DatasetDamaged):
            found.append(_file(store.get(one)))
    return FileList(
        data=found,
        has_more=len(ids) > limit,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )


def _file(stored: StoredDataset) -> File:
    manifest = stored.manifest
    errors = [one.sentence for one in manifest.report.faults if one.severity == "error"]
    return File(
        id=manifest.id,
        bytes=manifest.num_bytes,
        created_at=int(manifest.created.timestamp()),
        filename=manifest.name,
        status="error" if errors else "processed",
        status_details="; ".join(errors) or None,
    )


_FORM: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": [PURPOSE]},
                },
            }
        }
    },
}
