"""The job store: every row, every transition and every event of jobs; all of its SQL is here.

Whom webhooks tell of a transition is written with it, in the outbox.

Functions are plain and may wait for a disk or a server: call them in a thread. What a worker writes
counts only while the job is running under the token of its claim; afterwards it gets `StaleWorker`
and has changed nothing.
"""

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import sqlalchemy as sql
from sqlalchemy import ColumnElement, Connection, Select
from sqlalchemy.dialects import postgresql, sqlite

from app.errors import IdempotencyKeyReused, JobConflict, JobUnknown
from app.jobs.database import Database
from app.jobs.job import (
    FINAL,
    ID_PREFIXES,
    Event,
    EventType,
    Job,
    JobError,
    Kind,
    Level,
    NewEvent,
    NewJob,
    Request,
    StaleWorker,
    State,
    check_transition,
)
from app.jobs.outbox import post
from app.jobs.tables import EVENTS, JOBS, event_of, job_of

MAX_FRUITLESS: Final = 5
"""Attempts in a row without a newer snapshot, after which a job is given up."""
MAX_COUNTED: Final = 1000
"""A place in the queue is counted up to here, so that looking costs the same in any queue."""
DEFAULT_LEASE_S: Final = 15.0
Row = TypeVar("Row")


class JobStore:
    """The jobs of one database.

    Args:
        database: where they rest.
        lease_s: how long a worker is believed alive after its last heartbeat.

    Every function raises `app.errors.DatabaseUnavailable` where the database does not answer.
    """

    def __init__(self, database: Database, *, lease_s: float = DEFAULT_LEASE_S) -> None:
        self.database = database
        self.lease_s = lease_s

    # What anybody may ask for

    def create(self, new: NewJob, *, fingerprint: str | None = None) -> Job:
        """Write a job and its first event down; or find the one that this key made before.

        Args:
            new: the job.
            fingerprint: of the request, where `new` holds more than the caller said.

        Raises:
            IdempotencyKeyReused: the key made another job, from another request.
        """
        with self.database.write() as connection:
            return self._create(connection, new, fingerprint or _fingerprint(new))

    def find(self, by: str, idempotency_key: str) -> Job | None:
        """The job that `by` created with this key; None where there is none."""
        with self.database.read() as connection:
            row = connection.execute(_by_key(by, idempotency_key)).one_or_none()
            return job_of(row) if row else None

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            JobUnknown: there is none.
        """
        with self.database.read() as connection:
            return _one(connection, job_id)

    def list(
        self,
        kind: Kind,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[list[Job], bool]:
        """Jobs of a kind, newest first, and whether there are more.

        Args:
            kind: of the jobs.
            after: the id of the last job that the caller has seen.
            limit: how many at most.
            metadata: only those whose own holds all of this; reads rows until it has found enough.

        Raises:
            JobUnknown: `after` is no job.
        """
        holds = [self._has_metadata(name, value) for name, value in (metadata or {}).items()]
        query = sql.select(JOBS).where(JOBS.c.kind == kind, *holds)
        with self.database.read() as connection:
            if after is not None:
                query = query.where(JOBS.c.number < _one(connection, after).number)
            query = query.order_by(JOBS.c.number.desc()).limit(limit + 1)
            return _page([job_of(row) for row in connection.execute(query)], limit)

    def place(self, job: Job) -> int:
        """How many queued jobs of its kind come before a queued one; counts to `MAX_COUNTED`."""
        before = (
            sql.select(JOBS.c.number)
            .where(JOBS.c.state == State.QUEUED, JOBS.c.number < job.number)
            .where(JOBS.c.kind == job.kind)
            .limit(MAX_COUNTED)
        )
        with self.database.read() as connection:
            query = sql.select(sql.func.count()).select_from(before.subquery())
            return connection.execute(query).scalar_one()

    def running(self, kind: Kind) -> Sequence[Job]:
        """The jobs of a kind that are running, oldest first."""
        # Asked for with the kind, SQLite would go through all jobs of it, and few of them run.
        query = sql.select(JOBS).where(JOBS.c.state == State.RUNNING).order_by(JOBS.c.number)
        with self.database.read() as connection:
            found = [job_of(row) for row in connection.execute(query)]
            return [job for job in found if job.kind is kind]

    def ended_before(self, ids: Collection[str], age_s: float) -> Sequence[str]:
        """Those of the jobs `ids` that ended more than `age_s` seconds ago."""
        query = sql.select(JOBS.c.id).where(JOBS.c.id.in_(ids), JOBS.c.state.in_(FINAL))
        query = query.where(JOBS.c.finished < self.database.now - age_s)
        with self.database.read() as connection:
            return connection.execute(query).scalars().all()

    def unfinished(self, kinds: Collection[Kind]) -> Sequence[Job]:
        """The jobs of these kinds that have not ended, oldest first."""
        query = sql.select(JOBS).where(JOBS.c.state.not_in(FINAL), JOBS.c.kind.in_(kinds))
        with self.database.read() as connection:
            return [job_of(row) for row in connection.execute(query.order_by(JOBS.c.number))]

    def has_queued(self, kinds: Collection[Kind]) -> bool:
        """Whether something waits; costs less than a claim that finds nothing."""
        with self.database.read() as connection:
            return connection.execute(_oldest_queued(kinds)).scalar() is not None

    def events(
        self, job_id: str, *, after: int = 0, limit: int = 100
    ) -> tuple[Sequence[Event], bool]:
        """Events in order, from behind the sequence number `after`, and whether there are more.

        Raises:
            JobUnknown: there is no such job.
        """
        query = sql.select(EVENTS).where(EVENTS.c.sequence > after)
        return self._events(job_id, query.order_by(EVENTS.c.sequence), limit)

    def newest_events(
        self, job_id: str, *, before: int | None = None, limit: int = 20
    ) -> tuple[Sequence[Event], bool]:
        """Events, newest first, older than the sequence number `before`; and if there are more.

        Raises:
            JobUnknown: there is no such job.
        """
        query = sql.select(EVENTS)
        if before is not None:
            query = query.where(EVENTS.c.sequence < before)
        return self._events(job_id, query.order_by(EVENTS.c.sequence.desc()), limit)

    def metrics(self, job_id: str, *, most: int) -> tuple[Sequence[Event], bool]:
        """Events with numbers in order, and whether it is all; of more than `most`, one of so many.

        Raises:
            JobUnknown: there is no such job.
        """
        counted = sql.select(JOBS.c.number, JOBS.c.num_events).where(JOBS.c.id == job_id)
        with self.database.read() as connection:
            job = connection.execute(counted).one_or_none()
            if job is None:
                raise JobUnknown(f"there is no job {job_id!r}")
            # Odd, so that of kinds that take turns none is left out.
            stride = max(1, -(-job.num_events // most)) | 1
            query = sql.select(EVENTS).where(EVENTS.c.job == job.number)
            query = query.where(EVENTS.c.sequence % stride == 0, EVENTS.c.type == EventType.METRICS)
            rows = connection.execute(query.order_by(EVENTS.c.sequence))
            return [event_of(job_id, row) for row in rows], stride == 1

    def cancel(self, job_id: str, *, by: str = "local") -> Job:
        """End a job at once, whatever it was doing; nothing is kept.

        Raises:
            JobUnknown: there is no such job.
            JobConflict: it has ended another way, or its result is being published.
        """
        with self.database.write() as connection:
            job = _locked(connection, job_id)
            if job.state is State.CANCELLED:
                return job
            _refuse_if_settled(job, "cancelled")
            return self._move(connection, job, State.CANCELLED, f"cancelled by {by}")

    def delete(self, job_id: str) -> None:
        """Remove a job that has ended, with its events.

        Raises:
            JobUnknown: there is no such job.
            JobConflict: it has not ended.
        """
        with self.database.write() as connection:
            job = _locked(connection, job_id)
            if not job.is_final:
                raise JobConflict(f"job {job_id} is {job.state}; cancel it first")
            connection.execute(sql.delete(EVENTS).where(EVENTS.c.job == job.number))
            connection.execute(sql.delete(JOBS).where(JOBS.c.number == job.number))

    def pause(self, job_id: str, *, by: str = "local") -> Job:
        """Let a job wait until it is resumed: at once, or once its worker has written a snapshot.

        Raises:
            JobUnknown: there is no such job.
            JobConflict: it has ended, or its result is being published.
        """
        with self.database.write() as connection:
            job = _locked(connection, job_id)
            if job.state is State.PAUSED or job.request is Request.PAUSE:
                return job
            _refuse_if_settled(job, "paused")
            if job.state is State.QUEUED:
                return self._move(connection, job, State.PAUSED, f"paused by {by}")
            return self._ask(connection, job, Request.PAUSE, by)

    def resume(self, job_id: str, *, by: str = "local") -> Job:
        """Put a paused job back into the queue, at its old place.

        Raises:
            JobUnknown: there is no such job.
            JobConflict: it has ended, or is still being paused.
        """
        with self.database.write() as connection:
            job = _locked(connection, job_id)
            if job.request is Request.PAUSE:
                raise JobConflict(f"job {job_id} is still being paused; resume it in a moment")
            if job.state in (State.QUEUED, State.RUNNING):
                return job
            _refuse_if_settled(job, "resumed")
            return self._move(connection, job, State.QUEUED, f"resumed by {by}")

    def stop(self, job_id: str, *, by: str = "local") -> Job:
        """Let a job finish now and keep the best that it has; it ends as `succeeded`.

        Raises:
            JobUnknown: there is no such job.
            JobConflict: it has ended, is being published, or has nothing yet that could be kept.
        """
        with self.database.write() as connection:
            job = _locked(connection, job_id)
            if job.request is Request.STOP or (job.is_sealed and not job.is_final):
                return job
            _refuse_if_settled(job, "stopped")
            if job.state is not State.RUNNING and job.snapshot_step == 0:
                raise JobConflict(
                    f"job {job_id} has learned nothing yet that could be kept; cancel it instead"
                )
            if job.state is State.PAUSED:
                job = self._move(connection, job, State.QUEUED, f"resumed by {by}, to finish")
            return self._ask(connection, job, Request.STOP, by)

    # What workers do

    def claim(self, kinds: Collection[Kind], worker: str) -> Job | None:
        """Take the oldest queued job of these kinds; None where there is none.

        It is one statement, so that no two workers get the same job; its token is new.
        """
        oldest = _oldest_queued(kinds).with_for_update(skip_locked=True).scalar_subquery()
        claim = (
            sql.update(JOBS)
            .where(JOBS.c.number == oldest, JOBS.c.state == State.QUEUED)
            .values(
                state=State.RUNNING,
                worker=worker,
                token=JOBS.c.token + 1,
                attempt=JOBS.c.attempt + 1,
                num_fruitless=JOBS.c.num_fruitless + 1,
                started=sql.func.coalesce(JOBS.c.started, self.database.now),
                lease_until=self._lease_end,
                reason=None,
                num_events=JOBS.c.num_events + 1,
            )
            .returning(JOBS)
        )
        with self.database.write() as connection:
            row = connection.execute(claim).one_or_none()
            if row is None:
                return None
            again = f", attempt {row.attempt}" if row.attempt > 1 else ""
            data = {"state": State.RUNNING, "attempt": row.attempt, "worker": worker}
            self._insert_event(connection, row, NewEvent(f"running{again}", data=data))
            return job_of(row)

    def heartbeat(self, job: Job, progress: Mapping[str, Any] | None = None) -> Request | None:
        """Say that the worker of `job` lives; answers what has been asked of the job meanwhile.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        values: dict[str, Any] = {"lease_until": self._lease_end}
        if progress is not None:
            values["progress"] = dict(progress)
        with self.database.write() as connection:
            beat = sql.update(JOBS).where(*_held_by(job)).values(**values)
            row = connection.execute(beat.returning(JOBS.c.request)).one_or_none()
        if row is None:
            raise _stale(job)
        return Request(row.request) if row.request else None

    def record(self, job: Job, events: Iterable[NewEvent]) -> None:
        """Write down what happened to a running job.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            for event in events:
                self._change(connection, held, event)

    def snapshot_written(self, job: Job, step: int) -> None:
        """A snapshot of `step` is on disk; a newer one makes the attempt a fruitful one.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            if step > held.snapshot_step:
                change = sql.update(JOBS).where(JOBS.c.number == held.number)
                connection.execute(change.values(snapshot_step=step, num_fruitless=0))

    def seal(self, job: Job) -> None:
        """The result is about to be published: from now on the job cannot be cancelled.

        Raises:
            StaleWorker: the job is this worker's no more; nothing may be published.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            if not held.is_sealed:
                self._change(connection, held, NewEvent("publishing"), is_sealed=True, request=None)

    def amend(self, job: Job, found: Mapping[str, Any], message: str) -> None:
        """Add to a running job's options what its work has found out; once is enough.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            options = {**held.options, **found}
            if options != held.options:
                self._change(connection, held, NewEvent(message, data=found), options=options)

    def succeed(
        self,
        job: Job,
        result: Mapping[str, Any],
        message: str = "succeeded",
        *,
        then: NewJob | None = None,
    ) -> Job:
        """End a running job with its result, and create the job that follows it, in one.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            if then is not None:
                self._create(connection, then, _fingerprint(then))
            return self._move(connection, held, State.SUCCEEDED, message, result=dict(result))

    def fail(self, job: Job, error: JobError) -> Job:
        """End a running job with the reason why it failed.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            return self._fail(connection, _locked_by_holder(connection, job), error)

    def release(self, job: Job, reason: str, *, is_blamed: bool = True) -> Job:
        """The worker ends before its job: it is queued again, or paused where that was asked.

        Args:
            job: as it was claimed.
            reason: why, in a sentence.
            is_blamed: whether the attempt counts towards the five after which a job is given up.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            return self._give_back(connection, held, reason, is_blamed=is_blamed)

    def set_aside(self, job: Job, reason: str) -> Job:
        """Let a job wait, paused, until a person has seen to `reason` and resumes it.

        Raises:
            StaleWorker: the job is this worker's no more.
        """
        with self.database.write() as connection:
            held = _locked_by_holder(connection, job)
            return self._move(connection, held, State.PAUSED, reason, level=Level.WARN)

    def expire(self, dead_workers: Collection[str] = ()) -> Sequence[Job]:
        """Take jobs from workers whose lease is over, or who are known to be dead."""
        is_over = JOBS.c.lease_until < self.database.now
        query = (
            sql.select(JOBS)
            .where(JOBS.c.state == State.RUNNING)
            .where(sql.or_(is_over, JOBS.c.worker.in_(dead_workers)))
            .with_for_update(skip_locked=True)
        )
        with self.database.read() as connection:
            if connection.execute(query.with_only_columns(JOBS.c.id)).first() is None:
                return []
        with self.database.write() as connection:
            found = [job_of(row) for row in connection.execute(query)]
            return [
                self._give_back(connection, job, f"its worker {job.worker} died") for job in found
            ]

    # How it is written down

    @property
    def _lease_end(self) -> ColumnElement[float]:
        return self.database.now + self.lease_s

    def _has_metadata(self, name: str, value: str) -> ColumnElement[bool]:
        """Name and value are parameters, never parts of a path."""
        if self.database.is_sqlite:
            each = sql.func.json_each(JOBS.c.options, "$.metadata").table_valued("key", "value")
            return sql.exists().where(each.c.key == name, each.c.value == value)
        found: ColumnElement[str] = JOBS.c.options["metadata"][name].as_string()
        return found == value

    def _create(self, connection: Connection, new: NewJob, fingerprint: str) -> Job:
        values = {
            "id": f"{ID_PREFIXES[new.kind]}-{uuid.uuid4().hex[:24]}",
            "kind": new.kind,
            "state": State.QUEUED,
            "options": dict(new.options),
            "by": new.by,
            "idempotency_key": new.idempotency_key,
            "fingerprint": fingerprint,
            "model": new.model,
            "dataset": new.dataset,
            "created": self.database.now,
            "num_events": 1,
        }
        row = connection.execute(self._insert_once(values)).one_or_none()
        if row is None:
            return _created_before(connection, new, fingerprint)
        self._insert_event(connection, row, NewEvent("created", data={"state": State.QUEUED}))
        return job_of(row)

    def _insert_once(self, values: Mapping[str, Any]) -> Any:
        insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
        keys = [JOBS.c.by, JOBS.c.idempotency_key]
        return (
            insert(JOBS)
            .values(**values)
            .on_conflict_do_nothing(index_elements=keys)
            .returning(JOBS)
        )

    def _give_back(
        self, connection: Connection, job: Job, reason: str, *, is_blamed: bool = True
    ) -> Job:
        if job.request is Request.PAUSE:
            return self._move(connection, job, State.PAUSED, reason)
        if not is_blamed:
            kept = max(job.num_fruitless - 1, 0)
            return self._move(connection, job, State.QUEUED, reason, num_fruitless=kept)
        if job.num_fruitless >= MAX_FRUITLESS:
            sentence = (
                f"{MAX_FRUITLESS} attempts in a row brought it no further; the last: {reason}"
            )
            return self._fail(connection, job, JobError("attempts_exhausted", sentence))
        return self._move(connection, job, State.QUEUED, reason, level=Level.WARN)

    def _fail(self, connection: Connection, job: Job, error: JobError) -> Job:
        return self._move(
            connection,
            job,
            State.FAILED,
            error.message,
            level=Level.ERROR,
            error_code=error.code,
            error_message=error.message,
            error_param=error.param,
        )

    def _move(
        self,
        connection: Connection,
        job: Job,
        target: State,
        message: str,
        *,
        level: Level = Level.INFO,
        **values: Any,
    ) -> Job:
        """Bring a locked job to another state, with its event."""
        check_transition(job.state, target)
        values |= {"state": target, "worker": None, "lease_until": None}
        if target in (State.QUEUED, State.PAUSED):
            values["reason"] = message
        if target is not State.QUEUED:
            values["request"] = None
        if target in FINAL:
            values["finished"] = self.database.now
        event = NewEvent(message, level, data={"state": target})
        moved = self._change(connection, job, event, **values)
        post(connection, self.database, moved)
        return moved

    def _ask(self, connection: Connection, job: Job, request: Request, by: str) -> Job:
        event = NewEvent(f"{request} asked by {by}", data={"request": request})
        return self._change(connection, job, event, request=request)

    def _change(self, connection: Connection, job: Job, event: NewEvent, **values: Any) -> Job:
        """Change a locked job, and write the event of it."""
        values["num_events"] = JOBS.c.num_events + 1
        change = sql.update(JOBS).where(JOBS.c.number == job.number).values(**values)
        row = connection.execute(change.returning(JOBS)).one()
        self._insert_event(connection, row, event)
        return job_of(row)

    def _insert_event(self, connection: Connection, job: Any, event: NewEvent) -> None:
        insert = sql.insert(EVENTS).values(
            job=job.number,
            sequence=job.num_events,
            time=self.database.now,
            level=event.level,
            type=event.type,
            message=event.message,
            data=dict(event.data) or None,
        )
        connection.execute(insert)

    def _events(self, job_id: str, query: Select[Any], limit: int) -> tuple[Sequence[Event], bool]:
        with self.database.read() as connection:
            number = _one(connection, job_id).number
            rows = connection.execute(query.where(EVENTS.c.job == number).limit(limit + 1))
            return _page([event_of(job_id, row) for row in rows], limit)


def _fingerprint(new: NewJob) -> str:
    """Of what was asked for, so that a key that comes with another request is noticed."""
    asked = [new.kind, dict(new.options), new.model, new.dataset]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _created_before(connection: Connection, new: NewJob, fingerprint: str) -> Job:
    row = connection.execute(_by_key(new.by, str(new.idempotency_key))).one()
    if row.fingerprint != fingerprint:
        raise IdempotencyKeyReused(
            f"Idempotency-Key {new.idempotency_key!r} made job {row.id} from another request; "
            "take a new key",
            param="Idempotency-Key",
        )
    return job_of(row)


def _by_key(by: str, idempotency_key: str) -> Select[Any]:
    return sql.select(JOBS).where(JOBS.c.by == by, JOBS.c.idempotency_key == idempotency_key)


def _oldest_queued(kinds: Collection[Kind]) -> Select[Any]:
    """The number of the job that is next; answered by an index alone."""
    queued = sql.select(JOBS.c.number).where(JOBS.c.state == State.QUEUED, JOBS.c.kind.in_(kinds))
    return queued.order_by(JOBS.c.number).limit(1)


def _held_by(job: Job) -> tuple[ColumnElement[bool], ...]:
    """What is true of the row while the worker that claimed `job` still holds it."""
    return (JOBS.c.id == job.id, JOBS.c.token == job.token, JOBS.c.state == State.RUNNING)


def _one(connection: Connection, job_id: str) -> Job:
    row = connection.execute(sql.select(JOBS).where(JOBS.c.id == job_id)).one_or_none()
    if row is None:
        raise JobUnknown(f"there is no job {job_id!r}")
    return job_of(row)


def _locked(connection: Connection, job_id: str) -> Job:
    """The job, which nobody else changes before this transaction ends."""
    query = sql.select(JOBS).where(JOBS.c.id == job_id).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise JobUnknown(f"there is no job {job_id!r}")
    return job_of(row)


def _locked_by_holder(connection: Connection, job: Job) -> Job:
    """The same for a worker, if the job is still its own."""
    row = connection.execute(sql.select(JOBS).where(*_held_by(job)).with_for_update()).one_or_none()
    if row is None:
        raise _stale(job)
    return job_of(row)


def _stale(job: Job) -> StaleWorker:
    return StaleWorker(f"job {job.id} is no longer held under token {job.token}")


def _refuse_if_settled(job: Job, verb: str) -> None:
    """Refuse what comes too late."""
    if job.is_final:
        raise JobConflict(f"job {job.id} {_ended(job)} already and cannot be {verb}")
    if job.is_sealed:
        raise JobConflict(f"job {job.id} is being published and cannot be {verb} any more")


def _ended(job: Job) -> str:
    return "was cancelled" if job.state is State.CANCELLED else f"has {job.state}"


def _page(rows: list[Row], limit: int) -> tuple[list[Row], bool]:
    """One row more than wanted was asked for: whether it came says whether there are more."""
    return rows[:limit], len(rows) > limit
