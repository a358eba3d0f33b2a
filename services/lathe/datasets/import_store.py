"""Imports that are under way, in SQL, beside the datasets that they are of."""

from __future__ import annotations

from collections.abc import Sequence
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

    async def due(self, now: datetime) -> Sequence[Import]:
        query = (
            imports.select()
            .join(datasets, datasets.c.id == imports.c.dataset_id)
            .where(_UPLOADING, imports.c.next_time <= now)
            .order_by(imports.c.next_time, imports.c.dataset_id)
        )
        async with self._db.read() as connection:
            return [
                Import(row.project, row.dataset_id, row.source, row.tries)
                for row in await connection.execute(query)
            ]

    async def again(self, dataset_id: str, tries: int, next_time: datetime) -> None:
        async with self._db.write() as connection:
            await connection.execute(
                imports.update()
                .where(imports.c.dataset_id == dataset_id)
                .values(tries=tries, next_time=next_time)
            )

    async def fail(self, project: str, dataset_id: str, report: Report) -> None:
        failed = datasets.update().where(
            datasets.c.project == project, datasets.c.id == dataset_id, _UPLOADING
        )
        async with self._db.write() as connection:
            await connection.execute(failed.values(state=DatasetState.ERROR.value, report=asdict(report)))

    async def forget_ended(self) -> None:
        uploading = sa.select(datasets.c.id).where(_UPLOADING)
        async with self._db.write() as connection:
            await connection.execute(imports.delete().where(imports.c.dataset_id.not_in(uploading)))
