"""A stored dataset as a zip: what is in it, and what it is called there."""

import re
from collections.abc import Iterator
from typing import BinaryIO, Final
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse

from app.api.zip_stream import zipped
from training.dataset_store import StoredDataset

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._+@=-]")


def archive_of(dataset: StoredDataset) -> Response:
    """The answer that sends it."""
    headers = {"Content-Disposition": f'attachment; filename="{dataset.id}.zip"'}
    files = _files(dataset)
    return StreamingResponse(zipped(files), media_type="application/zip", headers=headers)


def _files(dataset: StoredDataset) -> Iterator[tuple[str, BinaryIO]]:
    """Pictures as `part/class/name`, or the one file of numbers; opened one after the other."""
    if dataset.manifest.kind != "pictures":
        for name in ("data.npz", "data.csv"):
            if (dataset.folder / name).is_file():
                yield name, (dataset.folder / name).open("rb")
        return
    for position, sample in enumerate(dataset.samples()):
        file = _safe(sample.name.rpartition("/")[2])[-80:]
        yield (
            f"{sample.part}/{_safe(sample.label)}/{position:06d}-{file}",
            dataset.file(sample).open("rb"),
        )


def _safe(text: str) -> str:
    """Whatever a label holds, as the name of a folder: what is unusual is percent-encoded."""
    safe = _UNSAFE.sub(lambda match: quote(match[0], safe=""), text)
    return safe if safe.strip(". ") else f"_{safe.replace('.', '%2E')}"
