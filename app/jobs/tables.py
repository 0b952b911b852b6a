"""The tables of the job database, and how a row becomes a `Job` or an `Event`."""

from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy import Column, Index, MetaData, Table

from app.jobs.job import Event, EventType, Job, JobError, Kind, Level, Request, State

SCHEMA_VERSION: Final = 1
METADATA: Final = MetaData()
_NUMBER: Final = sql.BigInteger().with_variant(sql.Integer(), "sqlite")
_SECONDS: Final[sql.Double[float]] = sql.Double()
_JSON: Final = sql.JSON(none_as_null=True)

SCHEMA: Final = Table("schema", METADATA, Column("version", sql.Integer, nullable=False))

JOBS: Final = Table(
    "jobs",
    METADATA,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", sql.String(64), nullable=False, unique=True),
    Column("kind", sql.String(32), nullable=False),
    Column("state", sql.String(16), nullable=False),
    Column("options", _JSON, nullable=False),
    Column("by", sql.Text, nullable=False),
    Column("idempotency_key", sql.Text),
    Column("fingerprint", sql.String(64), nullable=False),
    Column("model", sql.Text),
    Column("dataset", sql.Text),
    Column("created", _SECONDS, nullable=False),
    Column("started", _SECONDS),
    Column("finished", _SECONDS),
    Column("attempt", sql.Integer, nullable=False, default=0),
    Column("progress", _JSON),
    Column("result", _JSON),
    Column("error_code", sql.Text),
    Column("error_message", sql.Text),
    Column("error_param", sql.Text),
    Column("reason", sql.Text),
    Column("request", sql.String(16)),
    Column("is_sealed", sql.Boolean, nullable=False, default=False),
    Column("snapshot_step", sql.BigInteger, nullable=False, default=0),
    Column("num_fruitless", sql.Integer, nullable=False, default=0),
    Column("worker", sql.Text),
    Column("token", sql.Integer, nullable=False, default=0),
    Column("lease_until", _SECONDS),
    Column("num_events", sql.Integer, nullable=False, default=0),
    # Two names may use the same key; SQL lets any number of rows be without one.
    Index("jobs_by_idempotency_key", "by", "idempotency_key", unique=True),
    Index("jobs_by_state", "state", "number", "kind"),
    Index("jobs_by_kind", "kind", "number"),
    sqlite_autoincrement=True,
)

EVENTS: Final = Table(
    "events",
    METADATA,
    Column("job", _NUMBER, sql.ForeignKey(JOBS.c.number), primary_key=True, autoincrement=False),
    Column("sequence", sql.Integer, primary_key=True, autoincrement=False),
    Column("time", _SECONDS, nullable=False),
    Column("level", sql.String(8), nullable=False),
    Column("type", sql.String(16), nullable=False),
    Column("message", sql.Text, nullable=False),
    Column("data", _JSON),
)

WEBHOOKS: Final = Table(
    "webhooks",
    METADATA,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", sql.String(64), nullable=False, unique=True),
    Column("job", sql.String(64), nullable=False),
    Column("url", sql.Text, nullable=False),
    Column("type", sql.String(64), nullable=False),
    Column("created", _SECONDS, nullable=False),
    Column("due", _SECONDS, nullable=False),
    Column("attempts", sql.Integer, nullable=False, default=0),
    Index("webhooks_by_due", "due"),
)


def job_of(row: Any) -> Job:
    """A row of `jobs` as a `Job`."""
    error = JobError(row.error_code, row.error_message, row.error_param) if row.error_code else None
    return Job(
        id=row.id,
        number=row.number,
        kind=Kind(row.kind),
        state=State(row.state),
        options=row.options,
        by=row.by,
        idempotency_key=row.idempotency_key,
        model=row.model,
        dataset=row.dataset,
        created=row.created,
        started=row.started,
        finished=row.finished,
        attempt=row.attempt,
        progress=row.progress or {},
        result=row.result,
        error=error,
        reason=row.reason,
        request=Request(row.request) if row.request else None,
        is_sealed=row.is_sealed,
        snapshot_step=row.snapshot_step,
        num_fruitless=row.num_fruitless,
        worker=row.worker,
        token=row.token,
        lease_until=row.lease_until,
    )


def event_of(job_id: str, row: Any) -> Event:
    """A row of `events` as an `Event`."""
    return Event(
        job_id=job_id,
        sequence=row.sequence,
        time=row.time,
        level=Level(row.level),
        type=EventType(row.type),
        message=row.message,
        data=row.data or {},
    )
