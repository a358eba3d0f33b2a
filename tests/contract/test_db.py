"""One suite on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from lathe.common.db import (
    ANSWER_TIMEOUT_S,
    Database,
    UtcDateTime,
    check_schema,
    is_unique_violation,
    migrate,
    schema_state,
)
from lathe.common.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable
from tests.fixtures.servers import PostgresEndpoint

PACKAGE = "tests.contract.example_service"
metadata = sa.MetaData()
parents = sa.Table(
    "parents",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("at", UtcDateTime),
    sa.Column("data", sa.JSON),
)
children = sa.Table(
    "children",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("parent", sa.String, sa.ForeignKey("parents.id")),
)


@pytest.fixture(params=["sqlite", "postgres"])
async def empty(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"
    else:
        postgres: PostgresEndpoint = request.getfixturevalue("postgres")
        url = postgres.new_database(f"test_{uuid.uuid4().hex[:12]}")
    database = Database(url)
    yield database
    await database.close()


@pytest.fixture
async def db(empty: Database) -> Database:
    await migrate(empty, PACKAGE)
    return empty


async def count(db: Database) -> int:
    async with db.read() as connection:
        return (await connection.execute(sa.select(sa.func.count()).select_from(parents))).scalar_one()


async def test_migrations_know_their_state(empty: Database) -> None:
    assert await schema_state(empty, PACKAGE) == "behind"
    with pytest.raises(FailedPrecondition, match="lathe migrate"):
        await check_schema(empty, PACKAGE)
    await asyncio.gather(migrate(empty, PACKAGE), migrate(empty, PACKAGE))
    assert await schema_state(empty, PACKAGE) == "current"
    await check_schema(empty, PACKAGE)
    async with empty.write() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    assert await schema_state(empty, PACKAGE) == "ahead"
    with pytest.raises(FailedPrecondition, match="newer version of Lathe"):
        await migrate(empty, PACKAGE)
    with pytest.raises(FailedPrecondition, match="newer version of Lathe"):
        await check_schema(empty, PACKAGE)


async def test_a_write_is_committed_and_an_exception_rolls_it_back(db: Database) -> None:
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="a", data={"x": [1]}))
    with pytest.raises(ValueError, match="no"):
        async with db.write() as connection:
            await connection.execute(parents.insert().values(id="b"))
            raise ValueError("no")
    assert await count(db) == 1
    async with db.read() as connection:
        assert (await connection.execute(sa.select(parents.c.data))).scalar_one() == {"x": [1]}


async def test_times_come_back_in_utc(db: Database) -> None:
    here = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="a", at=here))
    async with db.read() as connection:
        found = (await connection.execute(sa.select(parents.c.at).where(parents.c.at == here))).scalar_one()
    assert found == here
    assert found.tzinfo is UTC
    with pytest.raises(sa.exc.StatementError, match="no time zone"):
        async with db.write() as connection:
            await connection.execute(parents.insert().values(id="b", at=datetime(2026, 1, 1)))


async def test_constraints(db: Database) -> None:
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="a"))
    for statement, unique in (
        (parents.insert().values(id="a"), True),
        (children.insert().values(id="c", parent="none"), False),
    ):
        with pytest.raises(sa.exc.IntegrityError) as caught:
            async with db.write() as connection:
                await connection.execute(statement)
        assert is_unique_violation(caught.value) is unique


async def test_many_writers_do_not_lose_updates(db: Database) -> None:
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="n", data=0))

    async def add() -> None:
        async with db.write() as connection:
            query = sa.select(parents.c.data).where(parents.c.id == "n").with_for_update()
            value = (await connection.execute(query)).scalar_one()
            await connection.execute(parents.update().values(data=value + 1))
        await count(db)

    await asyncio.gather(*(add() for _ in range(20)))
    async with db.read() as connection:
        assert (await connection.execute(sa.select(parents.c.data))).scalar_one() == 20


async def test_reading_goes_on_beside_a_writer(db: Database) -> None:
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="a"))
        assert await count(db) == 0
    assert await count(db) == 1


async def test_a_write_inside_a_read_is_a_fault(db: Database) -> None:
    with pytest.raises(Internal, match=r"db\.write"):
        async with db.read() as connection:
            await connection.execute(parents.insert().values(id="a"))


async def test_a_nul_in_a_text_is_refused_and_in_json_kept(db: Database) -> None:
    for statement in (
        parents.insert().values(id="a\0b", at=datetime.now(UTC), data=None),
        parents.insert().values([{"id": "a"}, {"id": "\0"}]),
        parents.delete().where(parents.c.id == "\0"),
    ):
        with pytest.raises(InvalidArgument, match="NUL"):
            async with db.write() as connection:
                await connection.execute(statement)
    with pytest.raises(InvalidArgument, match="NUL"):
        async with db.write() as connection:
            await connection.execute(parents.insert(), [{"id": "a"}, {"id": "\0"}])
    async with db.write() as connection:
        await connection.execute(parents.insert().values(id="b", at=None, data={"text": "a\0b"}))
    async with db.read() as connection:
        rows = (await connection.execute(parents.select())).all()
    assert [(row.id, row.data) for row in rows] == [("b", {"text": "a\0b"})]


async def test_wrong_sql_is_no_outage(empty: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        async with empty.read() as connection:
            await connection.execute(sa.text("SELECT nothing FROM nowhere"))
    await empty.check()


async def test_a_postgres_that_is_away_is_unavailable() -> None:
    with pytest.raises(Unavailable) as caught:
        await Database("postgresql+psycopg://nobody@127.0.0.1:1/none").check()
    assert caught.value.retry_after == 1.0


async def test_a_postgres_that_comes_back_is_used_again(postgres: PostgresEndpoint) -> None:
    db = Database(postgres.new_database(f"test_{uuid.uuid4().hex[:12]}"), pool_size=1)
    with pytest.raises(Unavailable):
        async with db.read() as connection:
            await connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
    await db.check()
    await db.close()


async def test_a_postgres_that_stands_still_is_unavailable(postgres: PostgresEndpoint) -> None:
    db = Database(postgres.new_database(f"test_{uuid.uuid4().hex[:12]}"), pool_size=1, answer_timeout_s=1.5)
    stopped: list[int] = []
    try:
        with pytest.raises(Unavailable) as caught:
            async with db.read() as connection:
                stopped.append((await connection.execute(sa.text("SELECT pg_backend_pid()"))).scalar_one())
                os.kill(stopped[0], signal.SIGSTOP)
                started = time.monotonic()
                await connection.execute(sa.text("SELECT 1"))
        assert time.monotonic() - started < ANSWER_TIMEOUT_S  # what it would wait without the setting
        await db.check()
    finally:
        os.kill(stopped[0], signal.SIGCONT)
    assert caught.value.retry_after == 1.0
    await db.close()


async def test_a_sqlite_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/missing/test.db")
    with pytest.raises(Unavailable, match="cannot be opened"):
        await db.check()
    await db.close()


async def test_a_full_disk_is_unavailable_and_keeps_what_was_there(tmp_path: Path) -> None:
    db = Database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", pool_size=1)
    await migrate(db, PACKAGE)
    async with db.read() as connection:
        # The same code that a full disk gives: the file may not grow by one page more.
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
        await connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(Unavailable, match="disk is full"):
        async with db.write() as connection:
            await connection.execute(parents.insert().values(id="x" * 1_000_000))
    assert await count(db) == 0
    await db.close()


async def test_a_database_in_memory(tmp_path: Path) -> None:
    db = Database("sqlite+aiosqlite://")
    await migrate(db, PACKAGE)
    assert await count(db) == 0
    await db.close()


async def test_sqlite_is_in_wal_mode(tmp_path: Path) -> None:
    db = Database(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    await db.check()
    await db.close()
    with sqlite3.connect(tmp_path / "test.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
