"""What evaluations found, one JSON file each: the row of a job holds the figures, this the rest."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

_ID: Final = re.compile(r"[a-z]+-[0-9a-f]{8,64}")


class Documents:
    """The files of one folder, which is made when something is first written.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write aside, sync, rename."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        aside = path.with_suffix(".part")
        with aside.open("wb") as file:
            # Ten times as fast as json, and as long it stops every other thread.
            file.write(orjson.dumps(document))
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)

    def read(self, name: str) -> dict[str, Any] | None:
        """None where it is not there any more."""
        try:
            found: dict[str, Any] = orjson.loads(self._path(name).read_bytes())
        except FileNotFoundError:
            return None
        return found

    def delete(self, name: str) -> None:
        """Remove it, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not _ID.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is no id of an evaluation")
        return self._folder / f"{name}.json"
