"""The owner of running jobs: claims when a slot is free, keeps leases, passes on what is asked, and
puts the work of dead workers back into the queue.
"""

import asyncio
import contextlib
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, TypeVar

from app.errors import DatabaseUnavailable
from app.jobs.channel import ALIVE, ORPHANED, PAUSE, PUBLISH, STOP
from app.jobs.job import EventType, Job, JobError, Kind, NewEvent, NewJob, Request, StaleWorker
from app.jobs.local_executor import Child, LocalExecutor
from app.jobs.memory_limit import MemoryLimit
from app.jobs.store import JobStore
from models.file_lock import is_locked, locked

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""How often the store is looked at for work that other processes left there."""
BEATS_PER_LEASE: Final = 8
MAX_PENDING_EVENTS: Final = 1000
KINDS: Final = (Kind.FINE_TUNING,)
STOPPED: Final = "the server was stopped; it goes on when a worker is there"
Answer = TypeVar("Answer")


class Runner:
    """Runs the fine-tuning jobs of one process.

    Args:
        store: the jobs.
        executor: starts their processes.
        slots: how many run at once; the device has room for so many.
        memory: what a job may take.
        grace_s: how long a child may take to write its snapshot and end.
    """

    def __init__(
        self,
        store: JobStore,
        executor: LocalExecutor,
        *,
        slots: int = 1,
        memory: MemoryLimit | None = None,
        grace_s: float = 20.0,
    ) -> None:
        self._store, self._executor, self._slots = store, executor, slots
        self._memory, self._grace_s = memory or MemoryLimit(), grace_s
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._locks = executor.home / "workers"
        self._attempts: dict[str, Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._nudged = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._trouble = ""

    def start(self) -> None:
        """Begin to claim jobs."""
        self._owner = asyncio.create_task(self._own(), name="run jobs")
        self._owner.add_done_callback(_tell_of_end)

    @property
    def broken(self) -> bool:
        """Whether it has ended without being asked to."""
        return self._owner is not None and self._owner.done() and not self._owner.cancelled()

    def nudge(self) -> None:
        """Look now: something was created, cancelled, paused or stopped here."""
        self._nudged.set()
        for attempt in self._attempts.values():
            attempt.nudge()

    async def stop(self) -> None:
        """Let every child write a snapshot and end; its job waits for the next worker."""
        if self._owner is None:
            return
        self._owner.cancel()
        await asyncio.gather(self._owner, return_exceptions=True)
        for attempt in self._attempts.values():
            attempt.interrupt()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._grace_s + self._store.lease_s)
        for task in self._tasks:
            task.cancel()

    async def _own(self) -> None:
        while True:
            try:
                await self._work_under_lock()
            except OSError as error:
                self._complain(error)
                await asyncio.sleep(POLL_S)

    async def _work_under_lock(self) -> None:
        self._locks.mkdir(parents=True, exist_ok=True)
        path = self._locks / f"{self.worker}.lock"
        # The system lets go of the lock when this process dies, and then others know at once.
        with locked(path, 1.0):
            try:
                while True:
                    await self._look()
                    with contextlib.suppress(TimeoutError):
                        # Not `wait_for`, which before Python 3.12 forgets a cancellation that
                        # comes together with what it waits for.
                        async with asyncio.timeout(POLL_S):
                            await self._nudged.wait()
                    self._nudged.clear()
            finally:
                if not self._tasks:
                    path.unlink(missing_ok=True)

    def _complain(self, error: Exception) -> None:
        """Once for each trouble, not once a second."""
        if str(error) != self._trouble:
            log.error("no jobs are begun: %s", error)
        self._trouble = str(error)

    async def _look(self) -> None:
        """Free what dead workers held, and fill the slots."""
        try:
            dead = await asyncio.to_thread(self._dead_workers)
            for job in await asyncio.to_thread(self._store.expire, dead):
                log.warning("job %s is %s: %s", job.id, job.state, job.reason)
            while len(self._attempts) < self._slots:
                if not await asyncio.to_thread(self._store.has_queued, KINDS):
                    return
                job_or_none = await asyncio.to_thread(self._store.claim, KINDS, self.worker)
                if job_or_none is None:
                    return
                self._begin(job_or_none)
            self._trouble = ""
        except DatabaseUnavailable as error:
            self._complain(error)

    def _dead_workers(self) -> list[str]:
        """Workers of this home that have let go of their lock."""
        names = {str(job.worker) for kind in KINDS for job in self._store.running(kind)}
        paths = [self._locks / f"{name}.lock" for name in names - {self.worker}]
        return [path.stem for path in paths if path.exists() and is_locked(path) is False]

    def _begin(self, job: Job) -> None:
        attempt = Attempt(self._store, self._executor, job, self._memory, self._grace_s)
        self._attempts[job.id] = attempt
        task = asyncio.create_task(attempt.run(), name=f"job {job.id}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(job.id, done))

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        del self._attempts[job_id]
        self._nudged.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("job %s lost its owner", job_id, exc_info=task.exception())


class Attempt:
    """One claim of one job: its process, its lease, and how it ends."""

    def __init__(
        self,
        store: JobStore,
        executor: LocalExecutor,
        job: Job,
        memory: MemoryLimit,
        grace_s: float,
    ) -> None:
        self._store, self._executor, self._job = store, executor, job
        self._memory, self._grace_s = memory, grace_s
        self._progress: dict[str, Any] = {}
        self._events: list[NewEvent] = []
        self._outcome: dict[str, Any] = {}
        self._nudged = asyncio.Event()
        self._is_interrupted = False
        self._is_stale = False
        self._is_ready = False
        self._too_much: str | None = None
        self._deadline: float | None = None
        self._last_step = 0

    def nudge(self) -> None:
        """Beat now."""
        self._nudged.set()

    def interrupt(self) -> None:
        """Let the child write a snapshot and end, because this process ends."""
        self._is_interrupted = True
        self.nudge()

    async def run(self) -> None:
        """From the claim to the end of the process, and what that means for the job."""
        try:
            child = await self._executor.start(self._job)
        except OSError as error:
            reason = f"its process did not start: {error}"
            await self._settle(lambda: self._store.release(self._job, reason))
            return
        beats = asyncio.create_task(self._beat(child), name=f"heartbeats of {self._job.id}")
        try:
            async for message in _until_closed(child):
                await self._hear(child, message)
            status = await child.ended()
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
            await child.kill()
        if not self._is_stale:
            await self._settle(lambda: self._end(status, child))

    async def _hear(self, child: Child, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "progress":
            self._note(message["progress"])
        elif kind == "snapshot":
            step = int(message["step"])
            await self._write(lambda: self._store.snapshot_written(self._job, step))
        elif kind == "resolved":
            found = {"resolved": message["resolved"]}
            await self._write(lambda: self._store.amend(self._job, found, "settings resolved"))
        elif kind == "ready":
            self._is_ready = True
            await self._write(self._pulse)
            await self._let_publish(child)
        else:
            self._outcome = message

    async def _let_publish(self, child: Child) -> None:
        """Seal the job; where the database does not answer, the next beat tries again."""
        if not self._is_ready:
            return
        if await self._write(lambda: self._store.seal(self._job)):
            self._is_ready = False
            child.tell(PUBLISH)

    def _note(self, progress: dict[str, Any]) -> None:
        """Keep the newest progress for the next beat, and what is new for the events."""
        self._progress = progress
        is_epoch = progress["phase"] == "epoch"
        is_train = progress["phase"] == "train" and progress["step"] != self._last_step
        if not is_epoch and not is_train:
            return
        self._last_step = progress["step"]
        sentence = f"epoch {progress['epoch']}, step {progress['step']}"
        event = NewEvent(sentence, type=EventType.METRICS, data=progress)
        if is_train and self._events and self._events[-1].data["phase"] == "train":
            self._events.pop()  # between two beats the newest is enough
        self._events = [*self._events, event][-MAX_PENDING_EVENTS:]

    async def _beat(self, child: Child) -> None:
        """Keep the lease while the database answers; pass on what is asked of the job."""
        interval_s = self._store.lease_s / BEATS_PER_LEASE
        while True:
            try:
                await self._beat_once(child)
            except Exception:
                # Without beats the lease would run out under a child that goes on.
                log.exception("job %s has lost its heartbeat", self._job.id)
                await child.kill()
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._nudged.wait()
            self._nudged.clear()

    async def _beat_once(self, child: Child) -> None:
        too_much = self._memory.reason(await asyncio.to_thread(child.memory_bytes))
        if too_much:
            self._too_much = too_much
            await child.kill()
            return
        asked = await self._write(self._pulse)
        if self._is_stale:
            await child.kill()
            return
        if asked is not None:
            child.tell(ALIVE)
            await self._let_publish(child)
        if self._is_interrupted or asked == Request.PAUSE:
            await self._hurry(child)
        elif asked == Request.STOP:
            child.tell(STOP)

    async def _hurry(self, child: Child) -> None:
        """Ask the child to end, and end it once its time is up."""
        child.tell(PAUSE)
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._grace_s
        if now > self._deadline:
            await child.kill()

    def _pulse(self) -> Request | str:
        """In a thread: the events since the last beat, and the beat."""
        events, self._events = self._events, []
        try:
            if events:
                self._store.record(self._job, events)
            return self._store.heartbeat(self._job, self._progress or None) or ""
        except DatabaseUnavailable:
            self._events = [*events, *self._events][-MAX_PENDING_EVENTS:]
            raise

    async def _write(self, write: Callable[[], Answer]) -> Answer | bool | None:
        """Do it in a thread; None if the database does not answer, and True for nothing."""
        try:
            answer = await asyncio.to_thread(write)
        except StaleWorker:
            self._is_stale = True
            return None
        except DatabaseUnavailable as error:
            log.warning("job %s: %s", self._job.id, error)
            return None
        return True if answer is None else answer

    async def _settle(self, write: Callable[[], Job]) -> None:
        """Write the end down; without a database the lease runs out, and somebody else does."""
        for _ in range(BEATS_PER_LEASE):
            done = await self._write(write)
            if isinstance(done, Job):
                log.info("job %s is %s", done.id, done.state)
            if done is not None or self._is_stale:
                return
            await asyncio.sleep(self._store.lease_s / BEATS_PER_LEASE)

    def _end(self, status: int, child: Child) -> Job:
        """What the end of the process means for the job; in a thread."""
        store, job, outcome = self._store, self._job, self._outcome
        if self._events:
            store.record(job, self._events)
            self._events = []
        kind = outcome.get("kind")
        if kind == "result":
            result = outcome["result"]
            sentence = f"published {result['model']}:{result['version']}"
            if told := result.get("validation"):
                sentence += f": {told}"
            return store.succeed(job, result, sentence, then=follower_of(job, result))
        if self._too_much:
            return store.fail(job, JobError("out_of_memory", self._too_much))
        if kind == "error":
            return self._end_with_error(outcome, child)
        if self._is_interrupted:
            return store.release(job, STOPPED, is_blamed=False)
        if kind == "ended":
            paused = outcome["how"] == "paused"
            reason = "paused" if paused else "the database was silent for a whole lease"
            return store.release(job, reason, is_blamed=False)
        log.warning("job %s: its process ended (%s):\n%s", job.id, status, _joined(child))
        return store.release(job, _ending(status, child))

    def _end_with_error(self, outcome: dict[str, Any], child: Child) -> Job:
        if outcome["passes"]:
            return self._store.set_aside(self._job, outcome["message"])
        if outcome["code"] == "internal_error":
            log.error("job %s:\n%s", self._job.id, _joined(child))
        return self._store.fail(self._job, JobError(outcome["code"], outcome["message"]))


def follower_of(job: Job, result: Mapping[str, Any]) -> NewJob | None:
    """What is done with the version that a job made: the gate, if it was asked for, or else an
    evaluation against the version that is in production; None if neither was.
    """
    kind = Kind.PROMOTION if "promotion" in job.options else Kind.EVALUATION
    asked = job.options.get(kind)
    if asked is None:
        return None
    version = f"{result['model']}:{result['version']}"
    question = {**asked["question"], "model": version, "run": job.id}
    options = {"question": question}
    if kind is Kind.PROMOTION:
        options["proposal"] = {**asked["proposal"], "version": result["version"]}
    else:
        question |= {"compare_to": result.get("current"), "leave_out_seen": True}
    dataset = asked["question"]["shown_as"]
    return NewJob(kind, options, job.by, follower_key(job.id), version, dataset)


def follower_key(job_id: str) -> str:
    """The idempotency key of what follows a job, by which it is found."""
    return f"follows\n{job_id}"  # no header holds a line break, so nobody else has this key


async def _until_closed(child: Child) -> AsyncIterator[dict[str, Any]]:
    """Its messages; a line that is torn or too long ends them, as its death would."""
    try:
        async for message in child.messages():
            yield message
    except ValueError:
        await child.kill()


def _ending(status: int, child: Child) -> str:
    if status == ORPHANED:
        return "its process lost its server"
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    last = next((line for line in reversed(child.last_words) if line.strip()), "")
    return f"its process {how}" + (f": {last[:300]}" if last and status > 0 else "")


def _joined(child: Child) -> str:
    return "\n".join(child.last_words)


def _tell_of_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("no more jobs are run here", exc_info=task.exception())
