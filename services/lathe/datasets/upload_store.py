"""Uploads in parts in SQL, beside the datasets that they are of."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from lathe.common.db import Database, is_unique_violation
from lathe.common.errors import Internal
from lathe.datasets.model import DatasetState
from lathe.datasets.tables import datasets, uploads
from lathe.datasets.uploads import UploadSession, UploadState

_PENDING = uploads.c.state == UploadState.PENDING.value
_PLAIN = (
    "project", "dataset_id", "display_name", "purpose", "size_bytes", "sha256", "md5", "create_time", "expire_time"
)  # fmt: skip


class _NeitherChanged(Exception):
    """Rolls back the transaction of two changes of which one could not be made."""


class SqlUploadStore:
    """UploadStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add_upload(self, session: UploadSession) -> UploadSession:
        row = {
            **{name: getattr(session, name) for name in _PLAIN},
            "state": session.state.value,
            "parts": list(session.parts),
        }
        try:
            async with self._db.write() as connection:
                await connection.execute(uploads.insert().values(row))
            return session
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        earlier = await self.get_upload(session.project, session.dataset_id)
        if earlier is None:
            raise Internal(f"The upload of {session.name} is another project's.")
        return earlier

    async def get_upload(self, project: str, dataset_id: str) -> UploadSession | None:
        async with self._db.read() as connection:
            row = (await connection.execute(uploads.select().where(*_is(project, dataset_id)))).one_or_none()
        return _session(row) if row is not None else None

    async def complete_upload(self, session: UploadSession, now: datetime) -> bool:
        project, dataset_id = session.project, session.dataset_id
        digests = {"md5": session.md5, "sha256": session.sha256}
        completed = (
            uploads.update()
            .where(*_is(project, dataset_id), _PENDING, uploads.c.expire_time > now)
            .values(state=UploadState.COMPLETED.value, parts=list(session.parts), **digests)
        )
        validating = (
            datasets.update()
            .where(*_its_dataset(project, dataset_id))
            .values(state=DatasetState.VALIDATING.value, size_bytes=session.size_bytes, sha256=session.sha256)
        )
        try:
            async with self._db.write() as connection:
                await _one(connection, completed)
                await _one(connection, validating)
        except _NeitherChanged:
            return False
        return True

    async def cancel_upload(self, project: str, dataset_id: str, now: datetime) -> bool:
        cancelled = (
            uploads.update()
            .where(*_is(project, dataset_id), _PENDING, uploads.c.expire_time > now)
            .values(state=UploadState.CANCELLED.value)
        )
        try:
            async with self._db.write() as connection:
                await _one(connection, cancelled)
                # It may have been deleted before.
                await connection.execute(_deleting(*_its_dataset(project, dataset_id)))
        except _NeitherChanged:
            return False
        return True

    async def expire_uploads(self, now: datetime) -> None:
        late = sa.select(uploads.c.dataset_id).where(_PENDING, uploads.c.expire_time <= now).with_for_update()
        async with self._db.write() as connection:
            ids = [row.dataset_id for row in await connection.execute(late)]
            if ids:
                expired = uploads.update().where(uploads.c.dataset_id.in_(ids))
                await connection.execute(expired.values(state=UploadState.EXPIRED.value))
                uploading = datasets.c.state == DatasetState.UPLOADING.value
                await connection.execute(_deleting(uploading, datasets.c.id.in_(ids)))

    async def forget_uploads(self, expired_before: datetime) -> None:
        validating = sa.select(datasets.c.id).where(datasets.c.state == DatasetState.VALIDATING.value)
        async with self._db.write() as connection:
            await connection.execute(
                uploads.delete().where(
                    ~_PENDING, uploads.c.expire_time < expired_before, uploads.c.dataset_id.not_in(validating)
                )
            )


async def _one(connection: AsyncConnection, change: sa.Update) -> None:
    if (await connection.execute(change)).rowcount != 1:
        raise _NeitherChanged


def _is(project: str, dataset_id: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return uploads.c.project == project, uploads.c.dataset_id == dataset_id


def _its_dataset(project: str, dataset_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    uploading = datasets.c.state == DatasetState.UPLOADING.value
    return datasets.c.project == project, datasets.c.id == dataset_id, uploading


def _deleting(*where: sa.ColumnElement[bool]) -> sa.Update:
    return datasets.update().where(*where).values(state=DatasetState.DELETING.value, request_key=None)


def _session(row: Any) -> UploadSession:
    plain = {name: getattr(row, name) for name in _PLAIN}
    return UploadSession(**plain, state=UploadState(row.state), parts=tuple(row.parts))
