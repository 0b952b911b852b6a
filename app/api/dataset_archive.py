"""A stored dataset as a zip: the same bytes each time, sent while it is made."""

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

from training.dataset_store import StoredDataset

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._+@=-]")


class _Pipe(io.RawIOBase):
    """What was written and not yet taken; zipfile sees a stream that cannot be rewound."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken


def zipped(dataset: StoredDataset) -> Iterator[bytes]:
    """Pictures as `part/class/name`, or the one file of numbers; stored, not packed again."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for name, path in _files(dataset):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), path.read_bytes())
            yield pipe.take()
    yield pipe.take()


def _files(dataset: StoredDataset) -> Iterator[tuple[str, Path]]:
    if dataset.manifest.kind != "pictures":
        for name in ("data.npz", "data.csv"):
            if (dataset.folder / name).is_file():
                yield name, dataset.folder / name
        return
    for position, sample in enumerate(dataset.samples()):
        file = _safe(sample.name.rpartition("/")[2])[-80:]
        yield (
            f"{sample.part}/{_safe(sample.label)}/{position:06d}-{file}",
            dataset.file(sample),
        )


def _safe(text: str) -> str:
    """Whatever a label holds, as the name of a folder: what is unusual is percent-encoded."""
    safe = _UNSAFE.sub(lambda match: quote(match[0], safe=""), text)
    return safe if safe.strip(". ") else f"_{safe.replace('.', '%2E')}"
