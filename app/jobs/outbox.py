"""The outbox: webhooks yet to be delivered, written in the transaction of what they tell.

Whatever dies between the two, a row is here until its receiver has said that it came, or too many
attempts have failed.
"""

import uuid
from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy import Connection

from app.jobs.database import Database
from app.jobs.job import FINAL, Job, Kind, State
from app.jobs.tables import WEBHOOKS
from app.jobs.webhook import Webhook

TOLD: Final[Mapping[State, str]] = {
    state: f"{Kind.FINE_TUNING}.job.{state}" for state in (*sorted(FINAL), State.PAUSED)
}
"""The events that webhooks tell of."""


def post(connection: Connection, database: Database, job: Job) -> None:
    """Write down that `job` has come to its state, for every address that is to be told."""
    if job.state not in TOLD:
        return
    for url in job.options.get("webhooks", ()):
        values = {
            "id": f"evt_{uuid.uuid4().hex}",
            "job": job.id,
            "url": url,
            "type": TOLD[job.state],
            "created": database.now,
            "due": database.now,
        }
        connection.execute(sql.insert(WEBHOOKS).values(**values))


class Outbox:
    """The webhooks of one database; every function may raise `DatabaseUnavailable`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def has_due(self) -> bool:
        """Whether something waits; costs less than a claim that finds nothing."""
        query = sql.select(WEBHOOKS.c.number).where(WEBHOOKS.c.due <= self._database.now).limit(1)
        with self._database.read() as connection:
            return connection.execute(query).scalar() is not None

    def claim(self, hold_s: float) -> Webhook | None:
        """Take the one that has been due longest; others leave it alone for `hold_s` seconds."""
        now = self._database.now
        due = sql.select(WEBHOOKS.c.number).where(WEBHOOKS.c.due <= now)
        due = due.order_by(WEBHOOKS.c.due).limit(1).with_for_update(skip_locked=True)
        claim = (
            sql.update(WEBHOOKS)
            .where(WEBHOOKS.c.number == due.scalar_subquery())
            .values(due=now + hold_s, attempts=WEBHOOKS.c.attempts + 1)
            .returning(WEBHOOKS)
        )
        with self._database.write() as connection:
            row = connection.execute(claim).one_or_none()
            return None if row is None else _webhook_of(row)

    def postpone(self, webhook: Webhook, pause_s: float) -> None:
        """Try again in `pause_s` seconds."""
        later = sql.update(WEBHOOKS).where(WEBHOOKS.c.id == webhook.id)
        with self._database.write() as connection:
            connection.execute(later.values(due=self._database.now + pause_s))

    def remove(self, webhook: Webhook) -> None:
        """It was delivered, or is given up."""
        with self._database.write() as connection:
            connection.execute(sql.delete(WEBHOOKS).where(WEBHOOKS.c.id == webhook.id))


def _webhook_of(row: Any) -> Webhook:
    return Webhook(row.id, row.type, row.created, row.job, row.url, row.attempts)
