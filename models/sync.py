"""Files and names that survive a loss of power."""

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Make what was written to `path` survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
