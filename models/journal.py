"""Files of JSON lines that only grow. A line counts once its newline is there."""

import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from models.store_error import StoreDamaged
from models.sync import sync_folder


def read_lines(path: Path) -> list[bytes]:
    """Whole lines, oldest first; none where there is no file."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """The object that a line of `path` holds.

    Raises:
        StoreDamaged: it holds none.
    """
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise StoreDamaged(
            f"{path.parent.name}/{path.name} has a line that is damaged: {line[:80]!r}"
        )
    return value


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Write one line more, over a torn last one if there is one, and sync it.

    The caller holds a lock: there is one writer at a time.

    Raises:
        TypeError, ValueError: `value` cannot be written as JSON; nothing is changed.
        OSError: the disk is full or fails; the line does not count.
    """
    line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    existed = path.exists()
    with path.open("ab", buffering=0) as file:
        end = path.read_bytes().rfind(b"\n") + 1
        file.truncate(end)
        try:
            _write_all(file, line)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # a line that was not acknowledged must not be seen
            raise
    if not existed:
        sync_folder(path.parent)


def _write_all(file: FileIO, data: bytes) -> None:
    """A disk that fills up takes a part first, and refuses the rest."""
    while data:
        data = data[file.write(data) :]
