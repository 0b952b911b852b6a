"""The owner of what runs leave behind: snapshots of jobs that have ended go after a while.

What people look at stays: results, answers, and the curves, here and as TensorBoard events. A job
that may still go on is never touched, nor a folder that belongs to no job of this database.
"""

import asyncio
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from app.errors import DatabaseUnavailable
from app.jobs.attempt_folder import has_attempts, remove_attempts
from app.jobs.store import JobStore

log = logging.getLogger(__name__)

LOOK_S: Final = 3600.0
MAX_RUNS: Final = 10_000
"""Of one look; the next one sees to the rest."""
NUM_AT_ONCE: Final = 20
PAUSE_S: Final = 0.2
"""Between so many runs, so that the disk is others' as well."""
LEAST_S: Final = 3600.0
"""Until then a process that was thought dead may still write."""


class Retention:
    """Removes the snapshots of one home's jobs.

    Args:
        store: says which jobs have ended.
        runs: the folder of their runs.
        keep_s: how long after its end a job's snapshots stay.
    """

    def __init__(self, store: JobStore, runs: Path, keep_s: float) -> None:
        self._store, self._runs, self._keep_s = store, runs, keep_s
        self._owner: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, now and then."""
        self._owner = asyncio.create_task(self._own(), name="remove old snapshots")
        self._owner.add_done_callback(_tell_of_end)

    async def stop(self) -> None:
        """Look no more."""
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)

    async def look(self) -> int:
        """Remove what is old enough, a few runs at a time; how many runs had something to go."""
        ids, num_removed = await asyncio.to_thread(self._with_snapshots), 0
        for first in range(0, len(ids), NUM_AT_ONCE):
            batch = ids[first : first + NUM_AT_ONCE]
            num_removed += await asyncio.to_thread(self._remove, batch)
            await asyncio.sleep(PAUSE_S)
        return num_removed

    async def _own(self) -> None:
        while True:
            try:
                num_removed = await self.look()
                if num_removed:
                    log.info("the snapshots of %d jobs that have ended are removed", num_removed)
            except (DatabaseUnavailable, OSError) as error:
                log.warning("old snapshots stay for now: %s", error)
            await asyncio.sleep(LOOK_S)

    def _with_snapshots(self) -> list[str]:
        if not self._runs.is_dir():
            return []
        return list(
            islice((one.name for one in self._runs.iterdir() if has_attempts(one)), MAX_RUNS)
        )

    def _remove(self, ids: Sequence[str]) -> int:
        ended = self._store.ended_before(ids, self._keep_s)
        for job_id in ended:
            remove_attempts(self._runs / job_id)
        return len(ended)


def _tell_of_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("no more old snapshots are removed", exc_info=task.exception())
