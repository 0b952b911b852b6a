"""`/v1/datasets`: labelled samples that are checked when they come, kept, looked at and changed."""

import asyncio
import base64
import binascii
import contextlib
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Header, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from app.api.dataset_archive import archive_of
from app.api.dataset_intake import Intake, Wanted, told
from app.api.dataset_pictures import contact_sheet, thumbnail
from app.api.permission import key_name, requires
from app.api.schema import EMPTY, error_answers, shown
from app.errors import BadInput, NotFound, refusal_of, v1_body
from training.dataset_store import DatasetDamaged, DatasetStore, DatasetUnknown, StoredDataset
from training.derive import Addition, Changes

MAX_PAGE: Final = 1000
MAX_KEY_CHARACTERS: Final = 256
_ID: Final = "dset-6730e52205eb541f8a97d7e3"
_REPORT: Final = {
    "usable": True,
    "faults": [
        {
            "kind": "skipped",
            "severity": "warning",
            "files": ["train/ants/imageNotFound.gif"],
            "count": 1,
            "sentence": "JPEG, PNG and WebP are read; left out",
        }
    ],
    "classes": {"ants": {"train": 123, "validation": 70}},
    "pictures": {"count": 397, "width": {"least": 193, "median": 500, "most": 2592}},
}
_EXAMPLE: Final = {
    "id": _ID,
    "object": "dataset",
    "name": "ants and bees",
    "kind": "pictures",
    "created": 1795396800,
    "by": "local",
    "parent": None,
    "classes": ["ants", "bees"],
    "num_samples": 397,
    "num_bytes": 47185920,
    "fingerprint": "6730e52205eb541f8a97d7e3a1",
    "report": _REPORT,
}
_SAMPLE: Final = {
    "index": 0,
    "name": "train/ants/0013035.jpg",
    "part": "train",
    "label": "ants",
    "sha256": "d4d3…",
    "width": 768,
    "height": 512,
    "thumbnail": f"/v1/datasets/{_ID}/samples/0/thumbnail",
}


class Dataset(BaseModel):
    """One dataset."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    kind: Literal["pictures", "arrays", "table"]
    created: int
    by: str = Field(description="Name of the key that sent it.")
    parent: str | None = Field(description="The dataset that it was derived from.")
    classes: list[str] = Field(description="In the order of the targets.")
    num_samples: int
    num_bytes: int
    fingerprint: str = Field(description="The same for the same samples, in whatever order.")
    report: dict[str, Any] = Field(description="Everything that was found, errors first.")


class DatasetList(BaseModel):
    """A page of datasets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    has_more: bool


class SampleList(BaseModel):
    """A page of samples."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool


class AddedPicture(BaseModel):
    """A picture to add."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=255)
    label: str = Field(min_length=1, max_length=255)
    part: Literal["train", "validation", "test"] = "train"
    picture: str = Field(description="JPEG, PNG or WebP in base64.")


class DeriveRequest(BaseModel):
    """What to change."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"example": {"rename": {"bee": "bees"}}}
    )

    name: str | None = Field(None, min_length=1, max_length=255)
    drop: list[str] = Field([], description="Names or sha256 of samples that go.")
    drop_faults: list[str] = Field(
        [], description="Kinds of faults whose samples go; of duplicates one of each stays."
    )
    relabel: dict[str, str] = Field({}, description="Name or sha256 of a sample to its label.")
    rename: dict[str, str] = Field({}, description="Class to its new name; equal names merge.")
    move: dict[str, str] = Field({}, description="Name or sha256 of a sample to its part.")
    add: list[AddedPicture] = Field([], max_length=1000)


READS, WRITES = [requires("evaluate")], [requires("data:write")]
Id = Annotated[str, Path(description="Id of the dataset.", max_length=64)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most entries of a page.")]


def datasets_routes(intake: Intake) -> APIRouter:
    """The routes of datasets."""
    router = APIRouter(prefix="/v1/datasets", tags=["datasets"])
    _receiving(router, intake)
    _describing(router, intake.store)
    _showing(router, intake.store)
    _changing(router, intake)
    return router


def _receiving(router: APIRouter, intake: Intake) -> None:
    @router.post(
        "",
        summary="Send a dataset and read what is right and wrong with it.",
        description=(
            "A zip of class folders (also inside `train/` and `val/`), a zip with a table of "
            "labels, an NPZ with `x` and `y`, or a CSV: as the form field `file`, or as the body. "
            "The answer holds the report with all faults at once. A dataset that nothing can be "
            "learned from is a 422 whose body holds the dataset all the same, so that "
            "`derive` can mend it."
        ),
        dependencies=WRITES,
        openapi_extra={"requestBody": _FILE_BODY},
        responses={
            200: {"content": {"application/json": {"example": _EXAMPLE}}},
            201: {
                "description": "Stored.",
                "content": {"application/json": {"example": _EXAMPLE}},
            },
            **error_answers(400, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 507),
        },
        response_model=Dataset,
    )
    async def create_dataset(
        request: Request,
        name: Annotated[str, Query(max_length=255, description="What to call it.")] = "",
        label_column: Annotated[
            str, Query(max_length=255, description="Column of a CSV that holds the label.")
        ] = "",
        model: Annotated[
            str, Query(max_length=200, description="A model that is to see it, to compare with.")
        ] = "",
        idempotency_key: Annotated[
            str | None,
            Header(max_length=MAX_KEY_CHARACTERS, description="The same key gives the same."),
        ] = None,
    ) -> Response:
        wanted = Wanted(name, label_column, model)
        with intake.place(), told():
            by = key_name(request.scope)
            stored, is_new = await intake.receive(request, wanted, idempotency_key, by)
            return _answer(stored, 201 if is_new else 200)


def _describing(router: APIRouter, store: DatasetStore) -> None:
    @router.get(
        "",
        summary="List datasets, newest first.",
        dependencies=READS,
        responses={
            **shown({"object": "list", "data": [_EXAMPLE], "has_more": False}),
            **error_answers(400, 422, 500, 503),
        },
    )
    async def list_datasets(
        limit: Limit = 20,
        after: Annotated[
            str | None, Query(max_length=64, description="Id that the page begins behind.")
        ] = None,
    ) -> DatasetList:
        return await asyncio.to_thread(_page, store, limit, after)

    @router.get(
        "/{dataset_id}",
        summary="Describe one dataset, with its report.",
        dependencies=READS,
        responses={**shown(_EXAMPLE), **error_answers(400, 404, 422, 500, 503)},
    )
    async def describe_dataset(dataset_id: Id) -> Dataset:
        with told():
            return _described(await asyncio.to_thread(store.get, dataset_id))

    @router.get(
        "/{dataset_id}/samples",
        summary="List the samples of a dataset.",
        dependencies=READS,
        responses={
            **shown({"object": "list", "data": [_SAMPLE], "has_more": True}),
            **error_answers(400, 404, 422, 500, 503),
        },
    )
    async def list_samples(
        dataset_id: Id,
        limit: Limit = 100,
        after: Annotated[int, Query(ge=-1, description="Index that the page begins behind.")] = -1,
        label: Annotated[str | None, Query(max_length=255, description="Only this class.")] = None,
        part: Annotated[
            Literal["train", "validation", "test"] | None, Query(description="Only this part.")
        ] = None,
    ) -> SampleList:
        with told():
            dataset = await asyncio.to_thread(store.get, dataset_id)
            return await asyncio.to_thread(_samples, dataset, limit, after, label, part)


def _showing(router: APIRouter, store: DatasetStore) -> None:
    @router.get(
        "/{dataset_id}/samples/{index}/thumbnail",
        summary="Show one picture, made small.",
        dependencies=READS,
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}},
            **error_answers(400, 404, 422, 500, 503),
        },
    )
    async def show_sample(
        dataset_id: Id,
        index: Annotated[int, Path(ge=0, description="As in the list.", examples=[0])],
    ) -> Response:
        def make() -> bytes:
            path = store.get(dataset_id).picture(index)
            if path is None:
                raise NotFound(f"{dataset_id} has no picture {index}")
            return thumbnail(path)

        with told():
            return Response(await asyncio.to_thread(make), media_type="image/jpeg")

    @router.get(
        "/{dataset_id}/preview",
        summary="Show some pictures of every class on one sheet.",
        dependencies=READS,
        response_class=Response,
        responses={
            200: {"content": {"image/jpeg": {}}},
            **error_answers(400, 404, 422, 500, 503),
        },
    )
    async def show_dataset(dataset_id: Id) -> Response:
        def make() -> bytes:
            dataset = store.get(dataset_id)
            if dataset.manifest.kind != "pictures":
                raise NotFound(f"{dataset_id} holds numbers, no pictures")
            return contact_sheet(dataset)

        with told():
            return Response(await asyncio.to_thread(make), media_type="image/jpeg")

    @router.get(
        "/{dataset_id}/download",
        summary="Download a dataset as a zip.",
        dependencies=READS,
        response_class=Response,
        responses={
            200: {"content": {"application/zip": {}}},
            **error_answers(400, 404, 422, 500, 503),
        },
    )
    async def download_dataset(dataset_id: Id) -> Response:
        with told():
            return archive_of(await asyncio.to_thread(store.get, dataset_id))


def _changing(router: APIRouter, intake: Intake) -> None:
    @router.delete(
        "/{dataset_id}",
        summary="Delete a dataset.",
        dependencies=WRITES,
        responses={
            **shown({"id": _ID, "object": "dataset", "deleted": True}),
            **error_answers(400, 403, 404, 422, 500, 503),
        },
    )
    async def delete_dataset(dataset_id: Id) -> dict[str, Any]:
        with told():
            await asyncio.to_thread(intake.store.delete, dataset_id)
        return {"id": dataset_id, "object": "dataset", "deleted": True}

    @router.post(
        "/{dataset_id}/derive",
        summary="Make another dataset of this one: drop, relabel, rename, move or add samples.",
        dependencies=WRITES,
        responses={
            **shown({**_EXAMPLE, "parent": _ID}),
            **error_answers(400, 403, 404, 408, 413, 422, 429, 500, 503, 507),
        },
        response_model=Dataset,
    )
    async def derive_dataset(request: Request, dataset_id: Id, wanted: DeriveRequest) -> Response:
        with intake.place(), told():
            changes, by = _changes(wanted), key_name(request.scope)
            derived = await intake.derive(request, dataset_id, changes, wanted.name, by)
            return _answer(derived, 200)


def _answer(stored: StoredDataset, status: int) -> Response:
    document = _described(stored).model_dump(mode="json")
    if stored.manifest.report.usable:
        return JSONResponse(document, status)
    errors = [one for one in stored.manifest.report.faults if one.severity == "error"]
    refusal = refusal_of(BadInput("; ".join(one.sentence for one in errors)))
    return JSONResponse({**v1_body(refusal), "dataset": document}, 422)


def _described(stored: StoredDataset) -> Dataset:
    manifest = stored.manifest
    return Dataset(
        created=int(manifest.created.timestamp()),
        classes=list(manifest.classes),
        report=manifest.report.model_dump(mode="json"),
        **manifest.model_dump(
            include={
                "id",
                "name",
                "kind",
                "by",
                "parent",
                "num_samples",
                "num_bytes",
                "fingerprint",
            }
        ),
    )


def _page(store: DatasetStore, limit: int, after: str | None) -> DatasetList:
    ids = store.ids()
    if after is not None:
        if after not in ids:
            raise NotFound(f"there is no dataset {after!r} to go on from")
        ids = ids[ids.index(after) + 1 :]
    found = []
    for one in ids[:limit]:
        with contextlib.suppress(DatasetUnknown, DatasetDamaged):
            found.append(_described(store.get(one)))
    return DatasetList(data=found, has_more=len(ids) > limit)


def _samples(
    dataset: StoredDataset, limit: int, after: int, label: str | None, part: str | None
) -> SampleList:
    wanted = (
        (index, one)
        for index, one in enumerate(dataset.samples())
        if index > after and label in (None, one.label) and part in (None, one.part)
    )
    page = [next(wanted, None) for _ in range(limit + 1)]
    found = [entry for entry in page if entry is not None]
    data = [
        {
            "index": index,
            "name": one.name,
            "part": one.part,
            "label": one.label,
            "sha256": one.sha256,
            "width": one.look.width if one.look else None,
            "height": one.look.height if one.look else None,
            "thumbnail": f"/v1/datasets/{dataset.id}/samples/{index}/thumbnail"
            if one.file
            else None,
        }
        for index, one in found[:limit]
    ]
    return SampleList(data=data, has_more=len(found) > limit)


def _changes(wanted: DeriveRequest) -> Changes:
    additions = []
    for one in wanted.add:
        try:
            data = base64.b64decode(one.picture, validate=True)
        except (binascii.Error, ValueError):
            raise BadInput(f"the picture {one.name!r} is not base64", param="add") from None
        additions.append(Addition(one.name, one.label, one.part, data))
    return Changes(
        wanted.drop, wanted.drop_faults, wanted.relabel, wanted.rename, wanted.move, additions
    )


_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}
_FILE_BODY: Final = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "name": {"type": "string", "description": "Of the file, if empty.", **EMPTY},
                    "label_column": {
                        "type": "string",
                        "description": "Of a CSV; its last one, if empty.",
                        **EMPTY,
                    },
                },
            }
        },
        "application/zip": _BYTES,
        "text/csv": _BYTES,
        "application/x-npz": _BYTES,
    },
}
