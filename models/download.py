"""Published weights from the network: bounded in time and size, checked by the hash in the name."""

import hashlib
import http.client
import os
import re
import urllib.request
from pathlib import Path

TIMEOUT_S = 30.0
MAX_BYTES = 8 * 1024**3
_PIECE_BYTES = 1 << 20
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


class DownloadError(Exception):
    """A file cannot be fetched, or is not the one that was published."""


def fetch(url: str, folder: Path, timeout_s: float = TIMEOUT_S) -> Path:
    """The file at `url`, from `folder` where it lies already, else downloaded into it.

    Args:
        url: its name must end in `-<hash>.<ending>`, the beginning of its sha256.
        folder: made where it is absent; the file appears in it whole or not at all.
        timeout_s: how long the other side may be silent.

    Raises:
        DownloadError: no network, an answer other than the file, or another hash.
    """
    name = url.rpartition("/")[2]
    found = _HASH_IN_NAME.search(name)
    if found is None:
        raise DownloadError(f"{name} does not carry its hash, so it cannot be checked")
    path = folder / name
    if path.is_file() and _sha256(path).startswith(found[1]):
        return path
    part = folder / f".{name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(url, part, timeout_s)
        if not _sha256(part).startswith(found[1]):
            raise DownloadError(f"what {url} gave is not {name}: its sha256 differs")
        part.replace(path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(
            f"{url} cannot be fetched ({error}); without a network, put the file at {path}"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(url: str, part: Path, timeout_s: float) -> None:
    left = MAX_BYTES
    with urllib.request.urlopen(url, timeout=timeout_s) as answer, part.open("wb") as file:
        while piece := answer.read(_PIECE_BYTES):
            left -= len(piece)
            if left < 0:
                raise DownloadError(f"{url} gives more than {MAX_BYTES} bytes")
            file.write(piece)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
