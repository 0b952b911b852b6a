"""An evaluation whose samples come with the request: a form with an archive, and what is wanted."""

import asyncio
from typing import Any, Final

from fastapi import Request
from pydantic import Field, ValidationError, field_validator

from app.api.dataset_intake import KINDS, Intake, Wanted, told
from app.api.evaluation_schema import EvaluationRequest, Versions
from app.api.json_body import bad_input
from app.api.permission import key_name
from app.api.schema import EMPTY
from app.errors import BadInput, MediaTypeRefused
from app.evaluation.uploads import Uploads
from models.store import ModelStore
from training.dataset_store import DatasetStore, StoredDataset

FORM: Final = "multipart/form-data"


class UploadedEvaluation(Versions):
    """A version, and samples in the field `file`; every field is a text."""

    name: str = Field(
        "", max_length=255, description="What to call the samples.", json_schema_extra=EMPTY
    )
    label_column: str = Field(
        "", max_length=255, description="Column of a CSV with the label.", json_schema_extra=EMPTY
    )
    keep: bool = Field(
        False, description="Whether they stay as a dataset; takes the scope `data:write`."
    )

    @field_validator("top_k", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        """`1,5` in a form."""
        return value.split(",") if isinstance(value, str) else value


def is_form(request: Request) -> bool:
    """Whether samples come with the request.

    Raises:
        MediaTypeRefused: they are its whole body, and nothing says what is wanted of them.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type in KINDS:
        raise MediaTypeRefused("send the archive as the field `file` of a form, beside `model`")
    return media_type == FORM


async def receive_samples(
    request: Request, intake: Intake, uploads: Uploads, store: ModelStore
) -> tuple[UploadedEvaluation, StoredDataset]:
    """Check and store the archive in the form: among the datasets, or for this evaluation only.

    Raises:
        BadInput: nothing can be learned from it, so nothing can be measured on it.
        As `app.api.upload.receive_file`, `Intake.check` and `told`; and as `ModelStore.resolve`.
    """
    with intake.place(), told():
        async with intake.arriving(request) as upload:
            wanted = _wanted(upload.fields)
            for model in wanted.versions():
                await asyncio.to_thread(store.resolve, model)
            kept_in = intake.store
            if wanted.keep:
                request.app.state.gate.admit(request.scope, "data:write")
            else:
                kept_in = DatasetStore(uploads.new())
            said = Wanted(wanted.name, wanted.label_column, "").completed(upload)
            try:
                stored = await intake.check(request, upload, said, key_name(request.scope), kept_in)
                _check_usable(stored)
            except BaseException:
                await asyncio.to_thread(uploads.remove, kept_in.folder / "none")
                raise
    return wanted, stored


def _wanted(fields: dict[str, str]) -> UploadedEvaluation:
    try:
        return UploadedEvaluation.model_validate(fields)
    except ValidationError as error:
        raise bad_input(error) from None


def _check_usable(stored: StoredDataset) -> None:
    errors = [one for one in stored.manifest.report.faults if one.severity == "error"]
    if errors:
        raise BadInput("; ".join(one.sentence for one in errors), param="file")


def _schema_of(kind: Any, **more: Any) -> dict[str, Any]:
    schema: dict[str, Any] = kind.model_json_schema()
    return {**schema, "properties": {**schema["properties"], **more}}


BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": _schema_of(EvaluationRequest),
                "example": {"model": "digits", "dataset": "digits"},
            },
            FORM: {
                "schema": _schema_of(
                    UploadedEvaluation,
                    file={
                        "type": "string",
                        "format": "binary",
                        "description": "A zip, an NPZ or a CSV, as `POST /v1/datasets` takes it.",
                    },
                )
            },
        },
    }
}
