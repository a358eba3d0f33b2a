"""Deployments and the creates of the HTTP door in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import sqlalchemy as sa

from lathe.common.clock import Clock
from lathe.common.db import Database, UtcDateTime, is_unique_violation
from lathe.common.errors import AlreadyExists
from lathe.common.ids import IdFactory
from lathe.common.names import last_id, project_of
from lathe.gateway.model import Deployment, IdempotencyRow

metadata = sa.MetaData()

deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("model_id", sa.String),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("update_time", UtcDateTime()),
    sa.Column("version", sa.Integer),
    sa.Column("request_id", sa.String),
)
idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String),
    sa.Column("path", sa.String),
    sa.Column("digest", sa.String),
    sa.Column("state", sa.String),
    sa.Column("created", UtcDateTime()),
    sa.Column("status", sa.Integer),
    sa.Column("body", sa.LargeBinary),
)


class SqlDeploymentStore:
    """DeploymentStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, deployment: Deployment, request_id: str) -> Deployment:
        row = {**_values(deployment), "request_id": request_id or None}
        try:
            async with self._db.write() as connection:
                await connection.execute(deployments.insert().values(row))
            return deployment
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            earlier = await self._made_by(row["project"], request_id)
            if earlier is not None:
                return earlier
            raise AlreadyExists(
                f"The deployment {last_id(deployment.name)!r} exists already; update it, or choose another id."
            ) from error

    async def _made_by(self, project: str, request_id: str) -> Deployment | None:
        if not request_id:
            return None
        query = deployments.select().where(
            deployments.c.project == project, deployments.c.request_id == request_id
        )
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return _deployment(row) if row is not None else None

    async def get(self, name: str) -> Deployment | None:
        async with self._db.read() as connection:
            row = (
                await connection.execute(deployments.select().where(deployments.c.name == name))
            ).one_or_none()
        return _deployment(row) if row is not None else None

    async def list(self, project: str, *, after: str, limit: int) -> Sequence[Deployment]:
        query = (
            deployments.select()
            .where(deployments.c.project == project, deployments.c.name > after)
            .order_by(deployments.c.name)
            .limit(limit)
        )
        async with self._db.read() as connection:
            return [_deployment(row) for row in await connection.execute(query)]

    async def update(self, deployment: Deployment, expected_version: int) -> bool:
        statement = (
            deployments.update()
            .where(deployments.c.name == deployment.name, deployments.c.version == expected_version)
            .values(_values(deployment))
        )
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def delete(self, name: str, expected_version: int | None) -> bool:
        statement = deployments.delete().where(deployments.c.name == name)
        if expected_version is not None:
            statement = statement.where(deployments.c.version == expected_version)
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount == 1


class SqlIdempotencyStore:
    """IdempotencyStore on a Database."""

    def __init__(self, db: Database, clock: Clock, ids: IdFactory) -> None:
        self._db = db
        self._clock = clock
        self._ids = ids

    async def begin(self, key_id: str, path: str, digest: str) -> IdempotencyRow:
        row = IdempotencyRow(self._ids.new("idem"), key_id, path, digest, "running", self._clock.now())
        values = {
            "id": row.id,
            "key_id": key_id,
            "path": path,
            "digest": digest,
            "state": row.state,
            "created": row.created,
        }
        async with self._db.write() as connection:
            await connection.execute(idempotency.insert().values(values))
        return row

    async def finish(self, row_id: str, status: int, body: bytes) -> None:
        statement = (
            idempotency.update()
            .where(idempotency.c.id == row_id)
            .values(state="done", status=status, body=body)
        )
        async with self._db.write() as connection:
            await connection.execute(statement)

    async def discard(self, row_id: str) -> None:
        async with self._db.write() as connection:
            await connection.execute(idempotency.delete().where(idempotency.c.id == row_id))

    async def newest(
        self, key_id: str, path: str, digest: str, *, within_s: float = 600
    ) -> IdempotencyRow | None:
        query = (
            idempotency.select()
            .where(
                idempotency.c.key_id == key_id,
                idempotency.c.path == path,
                idempotency.c.digest == digest,
                idempotency.c.created >= self._clock.now() - timedelta(seconds=within_s),
            )
            .order_by(idempotency.c.created.desc(), idempotency.c.id.desc())
            .limit(1)
        )
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return _row(row) if row is not None else None

    async def get(self, row_id: str) -> IdempotencyRow | None:
        async with self._db.read() as connection:
            row = (
                await connection.execute(idempotency.select().where(idempotency.c.id == row_id))
            ).one_or_none()
        return _row(row) if row is not None else None

    async def sweep(self, older_than_s: float) -> int:
        limit = self._clock.now() - timedelta(seconds=older_than_s)
        async with self._db.write() as connection:
            done = await connection.execute(idempotency.delete().where(idempotency.c.created < limit))
            return int(done.rowcount)


def _values(deployment: Deployment) -> dict[str, Any]:
    return {
        "name": deployment.name,
        "project": project_of(deployment.name),
        "model_id": deployment.model_id,
        "create_time": deployment.create_time,
        "update_time": deployment.update_time,
        "version": deployment.version,
    }


def _deployment(row: sa.Row[Any]) -> Deployment:
    return Deployment(row.name, row.model_id, row.create_time, row.update_time, row.version)


def _row(row: sa.Row[Any]) -> IdempotencyRow:
    return IdempotencyRow(
        row.id,
        row.key_id,
        row.path,
        row.digest,
        "done" if row.state == "done" else "running",
        row.created,
        row.status,
        cast("bytes | None", row.body),
    )
