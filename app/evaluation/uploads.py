"""Samples that were sent to be measured on once: a folder each, which goes with its evaluation."""

import shutil
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Final

ARRIVING_S: Final = 3600.0
"""A folder that no evaluation names may belong to a request that is still arriving, so long."""


class Uploads:
    """The folders below one, which is made when something is first sent.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def new(self) -> Path:
        """Where one dataset can be stored that nobody else will look for."""
        return self._folder / uuid.uuid4().hex

    def remove(self, dataset: str | Path) -> None:
        """Remove a dataset that was sent once, or what there is of it; no other is touched."""
        upload = Path(dataset).parent
        if upload.parent == self._folder:
            shutil.rmtree(upload, ignore_errors=True)

    def sweep(self, needed: Collection[str]) -> None:
        """Remove what killed servers left: neither in `needed` nor still arriving."""
        kept = {Path(dataset).parent for dataset in needed}
        for upload in self._folder.glob("*"):
            if upload not in kept and time.time() - upload.stat().st_mtime > ARRIVING_S:
                shutil.rmtree(upload, ignore_errors=True)
