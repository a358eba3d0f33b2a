"""Imports that are under way, in SQL, beside the datasets that they are of."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from lathe.common.db import Database, is_unique_violation
from lathe.datasets.model import DatasetState, Report
from lathe.datasets.ports import Import
from lathe.datasets.tables import datasets, imports

_UPLOADING = datasets.c.state == DatasetState.UPLOADING.value


class SqlImportStore:
    """ImportStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def begin(self, project: str, dataset_id: str, source: str, now: datetime) -> None:
        row = {"dataset_id": dataset_id, "project": project, "source": source, "tries": 0, "next_time": now}
        try:
            async with self._db.write() as connection:
                await connection.execute(imports.insert().values(row))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise

    async def take(self, staging_key: str, now: datetime, until: datetime) -> Import | None:
        others = imports.alias()
        under_way = (
            sa.select(sa.func.count())
            .select_from(others)
            .where(others.c.project == imports.c.project, others.c.next_time > now)
            .scalar_subquery()
        )
        query = (
            sa.select(*imports.c, datasets.c.staging_key.label("earlier_key"))
            .join_from(imports, datasets, datasets.c.id == imports.c.dataset_id)
            .where(_UPLOADING, imports.c.next_time <= now)
            .order_by(under_way, imports.c.next_time, imports.c.dataset_id)
            .limit(1)
            # Another replica's hand is on what is locked.
            .with_for_update(skip_locked=True)
        )
        async with self._db.write() as connection:
            row = (await connection.execute(query)).one_or_none()
            if row is None:
                return None
            is_it = imports.c.dataset_id == row.dataset_id
            await connection.execute(imports.update().where(is_it).values(next_time=until))
            its = datasets.update().where(datasets.c.id == row.dataset_id)
            await connection.execute(its.values(staging_key=staging_key))
        return Import(row.project, row.dataset_id, row.source, row.tries, staging_key, row.earlier_key)

    async def keep(self, item: Import, until: datetime) -> bool:
        return await self._change(_still_due(item).values(next_time=until))

    async def again(self, item: Import, tries: int, next_time: datetime) -> bool:
        return await self._change(_still_due(item).values(tries=tries, next_time=next_time))

    async def finish(self, item: Import, size_bytes: int, sha256: str) -> bool:
        state = DatasetState.VALIDATING.value
        return await self._change(
            datasets.update().where(*_is(item)).values(state=state, size_bytes=size_bytes, sha256=sha256)
        )

    async def fail(self, item: Import, report: Report) -> bool:
        state = DatasetState.ERROR.value
        return await self._change(
            datasets.update().where(*_is(item)).values(state=state, report=asdict(report))
        )

    async def forget_ended(self) -> None:
        uploading = sa.select(datasets.c.id).where(_UPLOADING)
        async with self._db.write() as connection:
            await connection.execute(imports.delete().where(imports.c.dataset_id.not_in(uploading)))

    async def _change(self, statement: sa.Update) -> bool:
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount > 0


def _is(item: Import) -> tuple[sa.ColumnElement[bool], ...]:
    """The dataset, as long as it is this try's."""
    return datasets.c.id == item.dataset_id, datasets.c.staging_key == item.staging_key, _UPLOADING


def _still_due(item: Import) -> sa.Update:
    dataset = sa.select(datasets.c.id).where(*_is(item))
    return imports.update().where(imports.c.dataset_id == item.dataset_id, dataset.exists())
