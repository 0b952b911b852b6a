"""Folders that are being written, before they are renamed to what they will be.

Each is locked for as long as its writer lives, so that what dead writers left can be told from
what a stopped or slow one is still writing.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from models.file_lock import is_locked, lock_folder

PREFIX: Final = ".staging-"
KEPT_S: Final = 24 * 3600.0
"""How long a writer is believed alive on a file system that cannot lock folders."""


@contextlib.contextmanager
def staging_folder(home: Path, lock: contextlib.AbstractContextManager[None]) -> Iterator[Path]:
    """A new empty folder in `home`; whatever is still there at the end is removed.

    Args:
        home: where the folder will be renamed to something.
        lock: that of `home`. It is held only while the folder is made and dead ones are swept.
    """
    staging = new_name(home)
    with lock:
        sweep(home)
        staging.mkdir()
        descriptor = lock_folder(staging)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def new_name(home: Path) -> Path:
    """A path in `home` that nobody else has, and that a sweep removes if it is left there."""
    return home / f"{PREFIX}{uuid.uuid4().hex}"


def sweep(home: Path) -> None:
    """Remove what dead writers left in `home`; call it with the lock of `home` held."""
    for path in home.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            locked = is_locked(path)
            if locked is False or (locked is None and _is_old(path)):
                shutil.rmtree(path, ignore_errors=True)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > KEPT_S
