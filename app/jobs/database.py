"""The job database: SQLite in a file by default, PostgreSQL by URL; transactions and the clock.

SQLite keeps its rollback journal: before 3.51.3 the write-ahead log can corrupt with several
processes. Writers begin with `BEGIN IMMEDIATE`, so that they wait for each other in line and never
fail half-way for want of a lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy import ColumnElement, Connection, event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.errors import DatabaseUnavailable
from app.jobs.tables import METADATA, SCHEMA, SCHEMA_VERSION

BUSY_TIMEOUT_MS: Final = 5000
"""How long a statement waits for another process's lock, and a connection for its server."""
_SCHEMA_LOCK: Final = 5_021_977  # any number: PostgreSQL's advisory locks have no names
_WRITES: Final = "writes"


class Database:
    """One database: transactions that read, transactions that write, and its clock.

    Args:
        url: `sqlite:///PATH` or `postgresql+psycopg://USER@HOST/NAME`.

    Raises:
        DatabaseUnavailable: the URL names no database that this installation can talk to.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.is_sqlite = self._engine.dialect.name == "sqlite"
        self._is_prepared = False

    @property
    def now(self) -> ColumnElement[float]:
        """Unix seconds by the database's own clock, whichever process asks."""
        if self.is_sqlite:
            # `unixepoch('subsec')` is younger than the SQLite of many systems.
            return sql.literal_column("((julianday('now') - 2440587.5) * 86400.0)", sql.Double())
        return sql.literal_column("extract(epoch from clock_timestamp())::float8", sql.Double())

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing.

        Raises:
            DatabaseUnavailable: locked for too long, gone, full, or not reachable.
        """
        with _told(), self._prepared().connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that changes something: all of it or, after an exception, nothing.

        Raises:
            DatabaseUnavailable: locked for too long, gone, full, or not reachable.
        """
        writing = self._prepared().execution_options(**{_WRITES: True})
        with _told(), writing.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of every connection."""
        self._engine.dispose()

    def _prepared(self) -> Engine:
        """The engine, once its tables are there; a database that is down may come up later."""
        if not self._is_prepared:
            with _told(), self._engine.execution_options(**{_WRITES: True}).begin() as connection:
                _prepare(connection)
            self._is_prepared = True
        return self._engine


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            engine = sql.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
            event.listen(engine, "connect", _open_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return sql.create_engine(
            parsed,
            pool_pre_ping=True,
            pool_timeout=BUSY_TIMEOUT_MS / 1000,
            connect_args={
                "connect_timeout": BUSY_TIMEOUT_MS // 1000,
                "options": f"-c lock_timeout={BUSY_TIMEOUT_MS} -c statement_timeout=30000",
            },
        )
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise DatabaseUnavailable(f"the job database cannot be used: {error}") from None


def _open_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    for pragma in ("journal_mode = DELETE", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare(connection: Connection) -> None:
    """Create the tables where there are none; refuse those of a newer program."""
    if connection.dialect.name == "postgresql":
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
    METADATA.create_all(connection)
    found = connection.execute(sql.select(SCHEMA.c.version)).scalar()
    if found is None:
        connection.execute(sql.insert(SCHEMA).values(version=SCHEMA_VERSION))
    elif found > SCHEMA_VERSION:
        raise DatabaseUnavailable(
            f"the job database has version {found} and this program knows {SCHEMA_VERSION}: "
            "it was written by a newer one"
        )


@contextmanager
def _told() -> Iterator[None]:
    """Failures of the database as one error of ours; what is a fault of ours stays as it is."""
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        raise DatabaseUnavailable(f"the job database does not answer: {_cause(error)}") from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise DatabaseUnavailable(f"the job database was lost: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """The first line of what the driver said."""
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__
