"""Features that stay on disk, for every run that asks the same backbone about the same pictures.

    <folder>/<key>/<sha256 of the file>.safetensors    features [n, *shape], digests uint8 [n, 32]

The key stands for the weights, the preprocessing and what else decides the bits. A file is written
beside, synced and renamed; its name proves its content, and one that is damaged is dropped. What
was used longest ago goes first when the cache grows over its bound.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import sha256_of, sync_folder

SUFFIX = ".safetensors"
_STAGING = ".writing-"
DIGEST_BYTES = 32


class FeatureCache:
    """The features of one key.

    Args:
        folder: of all keys; made when something is first kept.
        key: hex; whatever decides the features but the picture.
        max_bytes: of all keys together.
    """

    def __init__(self, folder: Path, key: str, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._own = folder / key

    def read(self, wanted: frozenset[bytes]) -> dict[bytes, Tensor]:
        """Digest -> features, of those `wanted` that are here."""
        found: dict[bytes, Tensor] = {}
        for path in sorted(self._own.glob(f"*{SUFFIX}")):
            for digest, row in _rows(path):
                if digest in wanted:
                    found[digest] = row
        return found

    def add(self, digests: list[bytes], features: Tensor) -> None:
        """Keep the rows of `features` under `digests`; a disk that is full keeps none of them."""
        if not digests:
            return
        self._own.mkdir(parents=True, exist_ok=True)
        staging = self._own / f"{_STAGING}{uuid.uuid4().hex}"
        names = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8)
        tensors = {"features": features.contiguous(), "digests": names.view(-1, DIGEST_BYTES)}
        try:
            save_file(tensors, staging)
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.rename(self._own / f"{sha256_of(staging)}{SUFFIX}")
            sync_folder(self._own)
        except (OSError, SafetensorError):
            staging.unlink(missing_ok=True)
        self._trim()

    def _trim(self) -> None:
        """Drop what was used longest ago, down to the bound, and what dead writers left."""
        files = sorted(_files(self.folder), reverse=True)
        total = 0
        for _, size, path in files:
            total += size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                path.rmdir()  # only where it is empty


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another run dropped it
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _rows(path: Path) -> list[tuple[bytes, Tensor]]:
    """Digests and features of one file; none if it is damaged or gone. Reading it is using it."""
    try:
        if sha256_of(path) != path.stem:
            path.unlink(missing_ok=True)
            return []
        tensors = load_file(path)
        os.utime(path)
        digests, features = tensors["digests"].numpy(), tensors["features"]
        return [(name.tobytes(), row) for name, row in zip(digests, features, strict=True)]
    except (OSError, ValueError, KeyError, SafetensorError):
        return []
