"""Whether a job takes so much memory that the container's limit is near, which would kill all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

CGROUPS: Final = Path("/sys/fs/cgroup")
MEBIBYTE: Final = 1024 * 1024
MOST_OF_CONTAINER: Final = 0.92
"""A job is ended when the container holds this share of its limit."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Limits that a job is watched against.

    Attributes:
        job_bytes: what a job may hold; 0 is no limit of its own.
        cgroups: where the cgroup file system is mounted, of version 1 or 2.
    """

    job_bytes: int = 0
    cgroups: Path = CGROUPS

    def reason(self, held_bytes: int) -> str | None:
        """Why a job that holds so much must end; None while all is well."""
        held = f"the job held {held_bytes // MEBIBYTE} MiB of memory"
        if self.job_bytes and held_bytes > self.job_bytes:
            return f"{held}, and {self.job_bytes // MEBIBYTE} MiB is its limit; {_ADVICE}"
        used, limit = _container(self.cgroups)
        # What a small job holds would not save the container, so it is not to blame.
        if limit and used > MOST_OF_CONTAINER * limit and held_bytes > 0.2 * limit:
            return f"{held} as the container came near its {limit // MEBIBYTE} MiB; {_ADVICE}"
        return None


_ADVICE: Final = "use a smaller batch or smaller pictures"


def _container(cgroups: Path) -> tuple[int, int]:
    """Bytes in use that cannot be dropped, and the limit; (0, 0) where there is none."""
    for usage, limit, folder, inactive in (
        ("memory.current", "memory.max", cgroups, "inactive_file"),
        (
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
            cgroups / "memory",
            "total_inactive_file",
        ),
    ):
        try:
            top = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue  # of the other version, or `max`
        if top >= psutil.virtual_memory().total:
            continue  # version 1 writes a number beyond all memory for none
        droppable = next((int(one.split()[1]) for one in lines if one.split()[0] == inactive), 0)
        return used - droppable, top
    return 0, 0
