"""Files of JSON lines that only grow. A line counts once its newline is there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoint import sync_folder
from models.store_error import StoreDamaged


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
    """
    line = json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    existed = path.exists()
    with path.open("ab") as file:
        if file.tell():
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if not existed:
        sync_folder(path.parent)
