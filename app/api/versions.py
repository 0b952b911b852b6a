"""`/v1/models/{model}/versions`: list, describe, upload, download and delete versions."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, BinaryIO, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from app.api.checkpoint_upload import receive_upload
from app.api.permission import key_name, requires
from app.api.registry import VersionDescription, described_version
from app.api.schema import EMPTY, error_answers, shown
from app.api.upload import disk_full
from app.api.zip_stream import zipped
from app.engine.live import LiveModels
from app.errors import Overloaded
from models.checkpoint import MANIFEST
from models.file_lock import locked
from models.staging import staging_folder
from models.store import ModelStore, Version

MAX_UPLOADS: Final = 2
LOCK_S: Final = 10.0
CHUNK_BYTES: Final = 1 << 20
_MODEL: Final = Path(description="Name of the model.", examples=["digits"], max_length=80)
_NUMBER: Final = Path(description="Number of the version.", ge=1, lt=10**9, examples=[1])
_VERSION: Final = {
    "object": "model.version",
    "model": "digits",
    "version": 2,
    "state": "live",
    "reason": "",
    "digest": "309aaa5384dea75e44c52c7f7dc27532a1d7903fc467982d87ef1fc54c712d69",
    "created": 1795396800,
    "network": {"name": "cnn", "options": {"channels": 1, "size": 8, "num_classes": 10}},
    "labels": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
    "input_shape": [1, 8, 8],
    "preprocessing": {"steps": [{"step": "decode"}, {"step": "color", "mode": "L"}]},
    "metrics": {"accuracy": 0.986},
    "lineage": {"dataset": "digits", "method": "train", "seed": 0},
    "live": True,
}
_BINARY: Final = {"type": "string", "format": "binary"}
_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/zip": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {**_BINARY, "description": "A zip of a checkpoint's folder, or:"},
                        "manifest": {"type": "string", "description": "manifest.json.", **EMPTY},
                        "weights": {**_BINARY, "description": "Its weights, as safetensors."},
                        "golden": {**_BINARY, "description": "Inputs and answers; optional."},
                        "sha256": {
                            "type": "string",
                            "description": "Of the weights; optional.",
                            **EMPTY,
                        },
                    },
                }
            },
        },
    }
}


class VersionListing(BaseModel):
    """One version and how it stands in this process."""

    object: Literal["model.version"] = "model.version"
    version: int
    state: Literal["live", "loading", "available", "failed", "unloaded"]
    reason: str = Field(description="Why it failed to load; else empty.")


class VersionList(BaseModel):
    """A page of versions, the newest first."""

    object: Literal["list"] = "list"
    data: list[VersionListing]
    has_more: bool


class WholeVersion(VersionDescription):
    """One version, with everything that it says of itself."""

    object: Literal["model.version"] = "model.version"
    model: str
    state: str
    reason: str


class Published(WholeVersion):
    """What became of an upload."""

    existed: bool = Field(description="Whether the same checkpoint was there already.")


class Deleted(BaseModel):
    """A version is gone."""

    object: Literal["model.version"] = "model.version"
    model: str
    version: int
    deleted: bool = True


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Where uploads are kept until they were checked, and how large one may be."""

    folder: FilePath
    max_bytes: int


def version_routes(store: ModelStore, live: LiveModels, limits: UploadLimits) -> APIRouter:
    """The routes of versions."""
    router = APIRouter(prefix="/v1/models/{model}/versions", tags=["models"])
    uploads = asyncio.Semaphore(MAX_UPLOADS)

    @router.get(
        "",
        summary="List the versions of a model, the newest first.",
        responses={
            **shown({"object": "list", "data": [_listing_example()], "has_more": False}),
            **error_answers(400, 401, 403, 404, 422, 500, 503),
        },
        dependencies=[requires("predict")],
    )
    async def list_versions(
        model: str = _MODEL,
        limit: int = Query(20, ge=1, le=100, description="Most versions in the answer."),
        after: int | None = Query(None, ge=1, description="Only versions older than this one."),
    ) -> VersionList:
        found = await asyncio.to_thread(listings_of, store, live, model)
        found = [one for one in found if after is None or one.version < after]
        return VersionList(data=found[:limit], has_more=len(found) > limit)

    @router.get(
        "/{number}",
        summary="Describe one version.",
        responses={**shown(_VERSION), **error_answers(400, 401, 403, 404, 422, 500, 503)},
        dependencies=[requires("predict")],
    )
    async def describe_version(model: str = _MODEL, number: int = _NUMBER) -> WholeVersion:
        return await asyncio.to_thread(_describe, store, live, model, number)

    @router.post(
        "",
        summary="Upload a checkpoint, which becomes the next version once it was checked.",
        responses={
            **shown({**_VERSION, "existed": False}),
            **error_answers(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 507),
        },
        dependencies=[requires("models:write")],
        openapi_extra=_BODY,
    )
    async def upload_version(request: Request, model: str = _MODEL) -> Published:
        if uploads.locked():
            raise Overloaded("two uploads are under way; send this one later", retry_after_s=5.0)
        await asyncio.to_thread(store.versions, model)  # a name that is none, before the body
        async with uploads, _folder(limits.folder) as folder:
            content_type = request.headers.get("content-type", "")
            upload = await receive_upload(request.stream(), content_type, folder, limits.max_bytes)
            by = key_name(request.scope)
            assert upload.intake is not None  # or it would have been refused
            await asyncio.to_thread(upload.intake.check, folder, sha256=upload.sha256, by=by)
            before = await asyncio.to_thread(store.versions, model)
            version = await asyncio.to_thread(_publish, store, model, folder, by)
            found = await asyncio.to_thread(_describe, store, live, model, version.number)
        return Published(**found.model_dump(), existed=version.number in before)

    @router.get(
        "/{number}/download",
        summary="Download a version as a zip of its checkpoint.",
        responses={
            200: {"content": {"application/zip": {}}, "description": "The archive."},
            **error_answers(400, 401, 403, 404, 422, 500, 503),
        },
        response_class=StreamingResponse,
        dependencies=[requires("models:write")],
    )
    async def download_version(model: str = _MODEL, number: int = _NUMBER) -> StreamingResponse:
        files = await asyncio.to_thread(_open_files, store, model, number)
        return StreamingResponse(
            zipped(files),
            media_type="application/zip",
            headers={
                "Content-Disposition": f'attachment; filename="{model}-{number}.zip"',
                "Accept-Ranges": "none",
            },
        )

    @router.delete(
        "/{number}",
        summary="Delete a version that no alias needs.",
        responses={
            **shown({"object": "model.version", "model": "digits", "version": 2, "deleted": True}),
            **error_answers(400, 401, 403, 404, 409, 422, 500, 503),
        },
        dependencies=[requires("models:write")],
    )
    async def delete_version(
        request: Request, model: str = _MODEL, number: int = _NUMBER
    ) -> Deleted:
        await asyncio.to_thread(store.delete, model, number, by=key_name(request.scope))
        await live.refresh(model)
        return Deleted(model=model, version=number)

    return router


@contextlib.asynccontextmanager
async def _folder(home: FilePath) -> AsyncIterator[FilePath]:
    """A folder for one upload; what dead processes left beside it is swept."""
    stack = contextlib.ExitStack()

    def enter() -> FilePath:
        home.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(staging_folder(home, locked(home / ".lock", LOCK_S)))

    try:
        yield await asyncio.to_thread(enter)
    finally:
        await asyncio.shield(asyncio.to_thread(stack.close))


def _publish(store: ModelStore, name: str, folder: FilePath, by: str) -> Version:
    def write(staging: FilePath) -> None:
        for path in folder.iterdir():
            path.rename(staging / path.name)

    try:
        return store.publish(name, write, by=by, why="uploaded")
    except OSError as error:
        raise disk_full(error) from error


def listings_of(store: ModelStore, live: LiveModels, name: str) -> list[VersionListing]:
    """Every version of a model and how it stands, the newest first; reads the disk."""
    store.aliases(name)  # an unknown name is an error
    found = []
    for one in reversed(live.listings(name)):
        failed = one.state == "UNAVAILABLE" and live.loads.failure((name, one.version))
        state: Any = {"READY": "live", "LOADING": "loading"}.get(one.state, "available")
        if failed:
            state = "failed"
        elif one.reason == "unloaded":
            state = "unloaded"
        found.append(VersionListing(version=one.version, state=state, reason=failed or ""))
    return found


def _describe(store: ModelStore, live: LiveModels, name: str, number: int) -> WholeVersion:
    said = described_version(store, live, name, number)
    states = {one.version: one for one in listings_of(store, live, name)}
    state = states[number]
    return WholeVersion(**said.model_dump(), model=name, state=state.state, reason=state.reason)


def _open_files(store: ModelStore, name: str, number: int) -> list[tuple[str, BinaryIO]]:
    """Opened together: a version that is deleted meanwhile is still sent whole."""
    folder = store.version(name, number).folder
    names = [MANIFEST, *Version(name, number, folder).manifest().files]
    with contextlib.ExitStack() as stack:
        files: list[tuple[str, BinaryIO]] = [
            (one, stack.enter_context((folder / one).open("rb"))) for one in names
        ]
        stack.pop_all()
        return files


def _zip_of(files: list[tuple[str, BinaryIO]]) -> Iterator[bytes]:
    """A zip of them, made while it is sent; at its end, whenever that is, all are closed."""
    with contextlib.ExitStack() as stack:
        for _, file in files:
            stack.enter_context(file)
        yield from zipped(files)


def _listing_example() -> dict[str, Any]:
    return {"object": "model.version", "version": 2, "state": "live", "reason": ""}
