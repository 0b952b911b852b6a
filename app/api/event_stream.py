"""Events of a job as server-sent events: from any of them on, until the job has ended."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from app.api.fine_tuning_job import event_object
from app.errors import DatabaseUnavailable, JobUnknown, Overloaded
from app.jobs.job import Event, Job
from app.jobs.store import JobStore

LOOK_S: Final = 0.5
PAGE: Final = 100
SIGN_OF_LIFE_S: Final = 15.0
LONGEST_S: Final = 3600.0
"""Then the stream ends, and its reader comes back with the last id that it has."""
MAX_STREAMS: Final = 64


class EventStreams:
    """The streams of one server, which are bounded in number and in time.

    Args:
        jobs: whose events.
        draining: whether the process is stopping, which ends every stream.
    """

    def __init__(self, jobs: JobStore, draining: Callable[[], bool]) -> None:
        self._jobs, self._draining, self._num_open = jobs, draining, 0

    def check_room(self) -> None:
        """Refuse one stream too many.

        Raises:
            Overloaded: so many are open.
        """
        if self._num_open >= MAX_STREAMS:
            raise Overloaded(
                f"{MAX_STREAMS} streams of events are open already; read pages instead",
                retry_after_s=5.0,
            )

    async def follow(self, job_id: str, after: int) -> AsyncIterator[str]:
        """Every event behind the sequence number `after`, each as it comes."""
        self._num_open += 1
        ends = time.monotonic() + LONGEST_S
        spoke = time.monotonic()
        try:
            while time.monotonic() < ends and not self._draining():
                job, events = await asyncio.to_thread(self._look, job_id, after)
                for event in events:
                    after, spoke = event.sequence, time.monotonic()
                    yield as_sent(event)
                if not events and job.is_final:
                    return
                if len(events) < PAGE:
                    await asyncio.sleep(LOOK_S)
                if time.monotonic() - spoke > SIGN_OF_LIFE_S:
                    spoke = time.monotonic()
                    yield ": still here\n\n"
        except (DatabaseUnavailable, JobUnknown):
            return  # deleted, or not to be read: whoever comes back is told
        finally:
            self._num_open -= 1

    def _look(self, job_id: str, after: int) -> tuple[Job, tuple[Event, ...]]:
        """The job first: if it has ended by then, no event is missing from what is read next."""
        job = self._jobs.get(job_id)
        return job, tuple(self._jobs.events(job_id, after=after, limit=PAGE)[0])


def as_sent(event: Event) -> str:
    """One event in the form that an `EventSource` reads; its id is the sequence number."""
    return (
        f"id: {event.sequence}\nevent: {event.type}\n"
        f"data: {event_object(event).model_dump_json()}\n\n"
    )
