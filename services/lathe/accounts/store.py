"""Projects and keys in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from lathe.accounts.model import ApiKey, Identity, Project, Quota
from lathe.common.db import Database, UtcDateTime, is_unique_violation
from lathe.common.errors import AlreadyExists

metadata = sa.MetaData()

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("display_name", sa.String),
    sa.Column("max_running_jobs", sa.Integer),
    sa.Column("max_queued_jobs", sa.Integer),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("version", sa.Integer),
    sa.Column("request_id", sa.String),
)
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("display_name", sa.String),
    sa.Column("role", sa.String),
    sa.Column("hint", sa.String),
    sa.Column("secret_hash", sa.String),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("revoke_time", UtcDateTime()),
    sa.Column("request_id", sa.String),
)


class SqlAccountStore:
    """AccountStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add_project(self, project: Project, request_id: str) -> Project:
        row = {**_project_values(project), "request_id": request_id or None}
        try:
            async with self._db.write() as connection:
                await connection.execute(projects.insert().values(row))
            return project
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            earlier = await self.get_project(project.id)
            if earlier is not None and await self._made_by(project.id, request_id):
                return earlier
            raise AlreadyExists(
                f"projects/{project.id} exists already; choose another project_id."
            ) from error

    async def _made_by(self, project_id: str, request_id: str) -> bool:
        query = sa.select(projects.c.request_id).where(projects.c.id == project_id)
        async with self._db.read() as connection:
            return bool(request_id) and (await connection.execute(query)).scalar_one_or_none() == request_id

    async def get_project(self, project_id: str) -> Project | None:
        async with self._db.read() as connection:
            row = (
                await connection.execute(projects.select().where(projects.c.id == project_id))
            ).one_or_none()
        return _project(row) if row is not None else None

    async def list_projects(self, *, after: str, limit: int) -> Sequence[Project]:
        query = projects.select().where(projects.c.id > after).order_by(projects.c.id).limit(limit)
        async with self._db.read() as connection:
            return [_project(row) for row in await connection.execute(query)]

    async def update_project(self, project: Project, expected_version: int) -> bool:
        statement = (
            projects.update()
            .where(projects.c.id == project.id, projects.c.version == expected_version)
            .values(_project_values(project))
        )
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def add_key(self, key: ApiKey, secret_hash: str, request_id: str) -> tuple[ApiKey, bool]:
        row = {**_key_values(key), "secret_hash": secret_hash, "request_id": request_id or None}
        try:
            async with self._db.write() as connection:
                await connection.execute(api_keys.insert().values(row))
            return key, True
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error) or not request_id:
                raise
        query = api_keys.select().where(
            api_keys.c.project == key.project, api_keys.c.request_id == request_id
        )
        async with self._db.read() as connection:
            return _key((await connection.execute(query)).one()), False

    async def add_first_key(self, key: ApiKey, secret_hash: str) -> bool:
        values = {**_key_values(key), "secret_hash": secret_hash}
        async with self._db.write() as connection:
            # Two replicas may start at once; the lock on the project's row lets one of them look first.
            await connection.execute(
                sa.select(projects.c.id).where(projects.c.id == key.project).with_for_update()
            )
            if (await connection.execute(sa.select(api_keys.c.id).limit(1))).first() is not None:
                return False
            await connection.execute(api_keys.insert().values(values))
            return True

    async def get_key(self, project_id: str, key_id: str) -> ApiKey | None:
        async with self._db.read() as connection:
            row = (await connection.execute(api_keys.select().where(*_is(project_id, key_id)))).one_or_none()
        return _key(row) if row is not None else None

    async def list_keys(self, project_id: str, *, after: str, limit: int) -> Sequence[ApiKey]:
        query = (
            api_keys.select()
            .where(api_keys.c.project == project_id, api_keys.c.id > after)
            .order_by(api_keys.c.id)
            .limit(limit)
        )
        async with self._db.read() as connection:
            return [_key(row) for row in await connection.execute(query)]

    async def revoke_key(self, project_id: str, key_id: str, now: datetime) -> ApiKey | None:
        statement = (
            api_keys.update()
            .where(*_is(project_id, key_id), api_keys.c.revoke_time.is_(None))
            .values(revoke_time=now)
        )
        async with self._db.write() as connection:
            await connection.execute(statement)
        return await self.get_key(project_id, key_id)

    async def find_secret(self, secret_hash: str) -> Identity | None:
        query = sa.select(api_keys.c.project, api_keys.c.role, api_keys.c.id).where(
            api_keys.c.secret_hash == secret_hash, api_keys.c.revoke_time.is_(None)
        )
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return Identity(row.project, row.role, row.id) if row is not None else None


def _is(project_id: str, key_id: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return api_keys.c.project == project_id, api_keys.c.id == key_id


def _project_values(project: Project) -> dict[str, Any]:
    return {
        "id": project.id,
        "display_name": project.display_name,
        "max_running_jobs": project.quota.max_running_jobs,
        "max_queued_jobs": project.quota.max_queued_jobs,
        "create_time": project.create_time,
        "version": project.version,
    }


def _project(row: Any) -> Project:
    quota = Quota(row.max_running_jobs, row.max_queued_jobs)
    return Project(row.id, row.display_name, quota, row.create_time, row.version)


def _key_values(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "project": key.project,
        "display_name": key.display_name,
        "role": key.role,
        "hint": key.hint,
        "create_time": key.create_time,
        "revoke_time": key.revoke_time,
    }


def _key(row: Any) -> ApiKey:
    return ApiKey(row.project, row.id, row.display_name, row.role, row.hint, row.create_time, row.revoke_time)
