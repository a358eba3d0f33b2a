"""One SQL database per service: SQLite embedded, PostgreSQL in a cluster, the same SQL on both.

Stores use SQLAlchemy Core inside `db.read()` or `db.write()`. Outages become Unavailable here, and a NUL in a text
InvalidArgument; IntegrityError passes through, because only the store knows what it means (see `is_unique_violation`).
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, DateTime, Dialect, TypeDecorator, event, inspect, make_url, text
from sqlalchemy import exc as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from lathe.common.dboutage import OutageReason, explain
from lathe.common.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable

SchemaState = Literal["current", "behind", "ahead"]

_WRITE = "lathe_write"
_BUSY_TIMEOUT_MS = 10_000
_UNIQUE_SQLSTATE = "23505"
# With the time for a new connection it stays below the deadline of a call between services (10 s).
ANSWER_TIMEOUT_S = 4.0
_POSTGRES_OUTAGES = {"53100": "cannot grow because its disk is full", "25006": "may not be written"}
# SQLite's OperationalError also covers wrong SQL; only these primary codes are outages.
_SQLITE_OUTAGES = {
    sqlite3.SQLITE_BUSY: "is locked by another process",
    sqlite3.SQLITE_LOCKED: "is locked",
    sqlite3.SQLITE_IOERR: "cannot be read or written",
    sqlite3.SQLITE_FULL: "cannot grow because the disk is full",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_READONLY: "may not be written",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time: aware in Python, `timestamptz` on PostgreSQL, UTC text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise Internal(f"{value!r} has no time zone; times are stored in UTC.")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """now: the server's clock. size_bytes: what this database takes up. free_bytes: room on the disk below it.

    None for what cannot be known: SQLite has no clock of its own, and PostgreSQL does not tell its disk's room.
    """

    now: datetime | None = None
    size_bytes: int | None = None
    free_bytes: int | None = None


class Database:
    """A service's database.

    url: `sqlite+aiosqlite:///path` or `postgresql+psycopg://user:password@host/name`. answer_timeout_s: how long
    PostgreSQL may take for one statement before it counts as away.
    """

    def __init__(self, url: str, pool_size: int = 5, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._sqlite = make_url(url).get_backend_name() == "sqlite"
        self._engine = (
            _sqlite_engine(url, pool_size)
            if self._sqlite
            else _postgres_engine(url, pool_size, answer_timeout_s)
        )
        event.listen(self._engine.sync_engine, "before_execute", _refuse_write_in_read)
        event.listen(self._engine.sync_engine, "before_cursor_execute", _refuse_nul, named=True)
        # SQLite has one writer at a time; waiting here costs nothing, waiting in the driver polls.
        self._writer = asyncio.Lock() if self._sqlite else nullcontext()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads. Raises Unavailable if the database is away."""
        with _outages():
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may write: committed at the end, rolled back by any exception.

        Raises Unavailable if the database is away, its disk is full, or another process keeps it locked.
        """
        with _outages():
            async with self._writer, self._engine.connect() as connection:
                await connection.execution_options(**{_WRITE: True})
                async with connection.begin():
                    yield connection

    async def check(self) -> None:
        """Raise Unavailable unless the database answers."""
        async with self.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def examine(self) -> DatabaseFacts:
        """Write something that changes nothing, and what there is to know. Raises Unavailable."""
        async with self.write() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
        async with self.read() as connection:
            if self._sqlite:
                return DatabaseFacts(free_bytes=_free_bytes(self._engine.url.database))
            sql = "SELECT clock_timestamp(), pg_database_size(current_database())"
            now, size = (await connection.execute(text(sql))).one()
            return DatabaseFacts(now=now, size_bytes=size)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def is_unique_violation(error: sa.IntegrityError) -> bool:
    """Whether a UNIQUE or PRIMARY KEY constraint refused the row (and not a foreign key or NOT NULL)."""
    if isinstance(error.orig, sqlite3.IntegrityError):
        return error.orig.sqlite_errorcode in (
            sqlite3.SQLITE_CONSTRAINT_UNIQUE,
            sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
        )
    return getattr(error.orig, "sqlstate", None) == _UNIQUE_SQLSTATE


def _sqlite_engine(url: str, pool_size: int) -> AsyncEngine:
    # A database in memory is its connection: there can be one only.
    in_memory = make_url(url).database in (None, "", ":memory:")
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1 if in_memory else pool_size,
        max_overflow=0,
        pool_timeout=_BUSY_TIMEOUT_MS / 1000,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        # The driver would begin by itself, too late and never IMMEDIATE.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (f"busy_timeout={_BUSY_TIMEOUT_MS}", "journal_mode=WAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _postgres_engine(url: str, pool_size: int, answer_timeout_s: float) -> AsyncEngine:
    from lathe.common.postgres import connector

    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_pre_ping=True,
        pool_timeout=3,
        connect_args={
            "async_creator_fn": connector(answer_timeout_s),
            "connect_timeout": 3,
            # A peer that vanished without a word is noticed within seconds, not hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 2,
            "tcp_user_timeout": 15_000,
            "options": f"-c statement_timeout={round(answer_timeout_s * 1000)} -c timezone=UTC",
        },
    )


def _refuse_write_in_read(
    connection: Connection, clause: Any, multiparams: Any, params: Any, options: Any
) -> None:
    if clause.is_dml and not connection.get_execution_options().get(_WRITE, False):
        raise Internal("A statement that writes was run inside db.read(); use db.write().")


def _refuse_nul(*, parameters: Any, executemany: bool, **_: Any) -> None:
    """PostgreSQL's texts cannot hold it and SQLite's can: what a client may send is the same on both."""
    for row in parameters if executemany else (parameters,):
        for value in row.values() if isinstance(row, dict) else row:
            if isinstance(value, str) and "\0" in value:
                raise InvalidArgument("A text of the request holds the character NUL; leave it out.")


@contextmanager
def _outages() -> Iterator[None]:
    """Turn what means "the database is away" into Unavailable and leave everything else alone."""
    try:
        yield
    except sa.TimeoutError as error:
        raise Unavailable(
            "The database is busy: no connection became free in time. Try again.",
            reason="DATABASE_BUSY",
            retry_after=1.0,
        ) from error
    except sa.DBAPIError as error:
        why = _outage(error)
        if why is None:
            raise
        raise Unavailable(
            f"The database {why}. Try again.", reason="DATABASE_UNAVAILABLE", retry_after=1.0
        ) from error


def _outage(error: sa.DBAPIError) -> str | None:
    """What keeps the database from answering; None if the statement itself is at fault."""
    if isinstance(error.orig, sqlite3.Error):
        code = getattr(error.orig, "sqlite_errorcode", None)
        return _SQLITE_OUTAGES.get(code & 0xFF) if code is not None else None
    state = getattr(error.orig, "sqlstate", None)
    if state in _POSTGRES_OUTAGES:
        return _POSTGRES_OUTAGES[state]
    if error.connection_invalidated or isinstance(error, sa.OperationalError | sa.InterfaceError):
        return "cannot be reached"
    return None


def outage_reason(error: BaseException, setting: str) -> OutageReason | None:
    """Why the database behind an Unavailable is away, for operators; None if the error is about something else.

    setting: the variable that holds the database's URL.
    """
    cause = error.__cause__
    if not isinstance(cause, sa.DBAPIError):
        return None
    if isinstance(cause.orig, sqlite3.Error):
        why = _outage(cause)
        return OutageReason(why, "Look after the disk below the data folder.") if why else None
    return explain(str(cause.orig), setting)


def _free_bytes(database: str | None) -> int | None:
    return shutil.disk_usage(Path(database).parent).free if database and database != ":memory:" else None


# --- migrations: Alembic makes them, and only who makes them loads it. A service that starts just compares numbers ---


async def migrate(db: Database, package: str) -> None:
    """Bring the schema to the newest revision under `<package>/migrations` (for instance `lathe.jobs`).

    All or nothing, and one process at a time. Raises FailedPrecondition if the database is newer than the
    code.
    """
    with outages_explained(package):
        async with db.write() as connection:
            await _migrate(db, connection, package)


async def _migrate(db: Database, connection: AsyncConnection, package: str) -> None:
    if db.dialect == "postgresql":
        key = zlib.crc32(f"lathe migrations of {package}".encode())
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    await connection.run_sync(_upgrade, package)


def _upgrade(connection: Connection, package: str) -> None:
    from alembic import command
    from alembic.config import Config

    if _state(connection, package) == "ahead":
        raise _newer(package)
    config = Config()
    config.set_main_option("script_location", f"{package}:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def run_migrations() -> None:
    """All that a service's `migrations/env.py` does: it imports this function and calls it."""
    from alembic import context

    context.configure(connection=context.config.attributes["connection"])
    with context.begin_transaction():
        context.run_migrations()


async def schema_state(db: Database, package: str) -> SchemaState:
    """Whether the schema is as new as the code, older (or not there yet), or newer."""
    async with db.read() as connection:
        return await connection.run_sync(_state, package)


def url_setting(package: str) -> str:
    """The variable that holds the URL of a service's database: LATHE_JOBS_DB__URL for `lathe.jobs`."""
    return f"LATHE_{package.rpartition('.')[2].upper()}_DB__URL"


@contextmanager
def outages_explained(package: str) -> Iterator[None]:
    """Turn an outage into Unavailable with the reason in words for operators: for starts and migrations."""
    try:
        yield
    except Unavailable as error:
        reason = outage_reason(error, url_setting(package))
        if reason is None:
            raise
        raise Unavailable(
            f"The database of {package} {reason.why}. {reason.advice}",
            reason=error.reason,
            retry_after=error.retry_after,
        ) from error


async def check_schema(db: Database, package: str) -> None:
    """Raise FailedPrecondition, with what to do, unless the schema is as new as the code.

    Raises Unavailable, saying why in words for operators, while the database is away.
    """
    with outages_explained(package):
        state = await schema_state(db, package)
    if state == "ahead":
        raise _newer(package)
    if state == "behind":
        raise FailedPrecondition(
            f"The database of {package} is older than this version of Lathe; run "
            f"`lathe migrate {package.rpartition('.')[2]}` first.",
            reason="DATABASE_OLDER",
        )


def _newer(package: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The database of {package} was written by a newer version of Lathe; start that version.",
        reason="DATABASE_NEWER",
    )


def _state(connection: Connection, package: str) -> SchemaState:
    known = revisions(package)
    found: set[str] = set()
    if inspect(connection).has_table("alembic_version"):
        found = set(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())
    if found == {known[-1]}:
        return "current"
    return "behind" if found <= set(known) else "ahead"


def revisions(package: str) -> list[str]:
    """Of a service's migrations, oldest first: each file below `migrations/versions` begins with its own."""
    names = (entry.name for entry in (files(package) / "migrations" / "versions").iterdir())
    return sorted(name.partition("_")[0] for name in names if name[0].isdigit() and name.endswith(".py"))
