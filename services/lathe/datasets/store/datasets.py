"""Datasets in SQL, from the upload to their deletion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from lathe.common.db import is_unique_violation
from lathe.common.errors import Internal
from lathe.datasets.model import RESULTS_PURPOSE, AuditState, Dataset, DatasetState, Report
from lathe.datasets.operations import to_json
from lathe.datasets.ports import Awaited
from lathe.datasets.store import rows
from lathe.datasets.store.base import LIVE, Base, is_dataset
from lathe.datasets.tables import audits, datasets, imports, uploads


class Datasets(Base):
    async def add(self, dataset: Dataset, request_key: str) -> Dataset:
        if await self.add_all([(dataset, request_key)]):
            return dataset
        earlier = await self.find_by_request(dataset.project, request_key) if request_key else None
        if earlier is None:
            raise Internal(f"{dataset.name} is there already.")
        return earlier

    async def add_all(self, new: Sequence[tuple[Dataset, str]]) -> bool:
        try:
            async with self._db.write() as connection:
                for dataset, request_key in new:
                    await connection.execute(datasets.insert().values(_row(dataset, request_key)))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            return False
        return True

    async def get(self, project: str, dataset_id: str) -> Dataset | None:
        found = await self._select(datasets.select().where(LIVE, *is_dataset(project, dataset_id)))
        return found[0] if found else None

    async def find_by_request(self, project: str, request_key: str) -> Dataset | None:
        query = datasets.select().where(
            LIVE, datasets.c.project == project, datasets.c.request_key == request_key
        )
        found = await self._select(query)
        return found[0] if found else None

    async def page(
        self, project: str, *, purpose: str, after: tuple[datetime, str] | None, ascending: bool, limit: int
    ) -> Sequence[Dataset]:
        time, id_ = datasets.c.create_time, datasets.c.id
        query = datasets.select().where(LIVE, datasets.c.project == project)
        if purpose:
            query = query.where(datasets.c.purpose == purpose)
        if after is not None:
            beyond = (time > after[0], id_ > after[1]) if ascending else (time < after[0], id_ < after[1])
            query = query.where(sa.or_(beyond[0], sa.and_(time == after[0], beyond[1])))
        order = (time, id_) if ascending else (time.desc(), id_.desc())
        return await self._select(query.order_by(*order).limit(limit))

    async def in_state(self, state: DatasetState) -> Sequence[Dataset]:
        query = datasets.select().where(datasets.c.state == state.value)
        return await self._select(query.order_by(datasets.c.create_time, datasets.c.id))

    async def with_leftovers(self) -> Sequence[Dataset]:
        done = (DatasetState.READY.value, DatasetState.ERROR.value)
        return await self._select(
            datasets.select().where(datasets.c.state.in_(done), datasets.c.staging_key != "")
        )

    async def outlived(self, now: datetime, abandoned_before: datetime) -> Sequence[Dataset]:
        abandoned = sa.and_(
            datasets.c.state == DatasetState.UPLOADING.value,
            datasets.c.create_time < abandoned_before,
            datasets.c.id.not_in(sa.select(imports.c.dataset_id)),
        )
        return await self._select(
            datasets.select().where(LIVE, sa.or_(datasets.c.expire_time <= now, abandoned))
        )

    async def count(self) -> Mapping[DatasetState, int]:
        query = sa.select(datasets.c.state, sa.func.count()).group_by(datasets.c.state)
        async with self._db.read() as connection:
            found = {DatasetState(row[0]): int(row[1]) for row in await connection.execute(query)}
        return {state: found.get(state, 0) for state in DatasetState}

    async def waiting_since(self) -> Mapping[Awaited, datetime | None]:
        fetched = sa.select(imports.c.dataset_id)
        made = sa.select(sa.func.min(datasets.c.create_time))
        oldest: dict[Awaited, sa.Select[Any]] = {
            "import": made.where(
                datasets.c.state == DatasetState.UPLOADING.value, datasets.c.id.in_(fetched)
            ),
            "validation": made.where(datasets.c.state == DatasetState.VALIDATING.value),
            "audit": sa.select(sa.func.min(audits.c.create_time)).where(
                audits.c.state == AuditState.RUNNING.value
            ),
        }
        async with self._db.read() as connection:
            return {
                awaited: (await connection.execute(query)).scalar_one() for awaited, query in oldest.items()
            }

    async def _select(self, query: sa.Select[Any]) -> list[Dataset]:
        async with self._db.read() as connection:
            return [rows.dataset(row) for row in await connection.execute(query)]

    async def begin_validation(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        # Jobs may repeat the call that makes a results file with other bytes while it is not READY.
        repeated = sa.and_(
            datasets.c.state == DatasetState.VALIDATING.value, datasets.c.purpose == RESULTS_PURPOSE
        )
        return await self._change(
            datasets.update()
            .where(
                *is_dataset(project, dataset_id),
                sa.or_(datasets.c.state == DatasetState.UPLOADING.value, repeated),
            )
            .values(state=DatasetState.VALIDATING.value, size_bytes=size_bytes, sha256=sha256)
        )

    async def staged_parts(self, project: str, dataset_id: str) -> tuple[Sequence[str], str]:
        query = sa.select(uploads.c.parts, uploads.c.md5).where(
            uploads.c.project == project, uploads.c.dataset_id == dataset_id
        )
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return (row.parts, row.md5) if row is not None else ((), "")

    async def note_digest(self, project: str, dataset_id: str, sha256: str) -> bool:
        return await self._change(
            datasets.update()
            .where(*is_dataset(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
            .values(sha256=sha256)
        )

    async def note_conversion(
        self, project: str, dataset_id: str, stored: tuple[str, int], uploaded: tuple[str, int]
    ) -> bool:
        return await self._change(
            datasets.update()
            .where(*is_dataset(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
            .values(
                sha256=stored[0],
                size_bytes=stored[1],
                source_sha256=uploaded[0],
                source_size_bytes=uploaded[1],
            )
        )

    async def finish_validation(
        self, project: str, dataset_id: str, state: DatasetState, sha256: str, report: Report | None
    ) -> bool:
        return await self._change(
            datasets.update()
            .where(*is_dataset(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
            .values(state=state.value, sha256=sha256, report=asdict(report) if report is not None else None)
        )

    async def clear_staging(self, project: str, dataset_id: str) -> None:
        await self._change(datasets.update().where(*is_dataset(project, dataset_id)).values(staging_key=""))

    async def begin_delete(self, project: str, dataset_id: str) -> bool:
        return await self._change(
            datasets.update()
            .where(LIVE, datasets.c.frozen_as.is_(None), *is_dataset(project, dataset_id))
            .values(state=DatasetState.DELETING.value, request_key=None)
        )

    async def remove(self, project: str, dataset_id: str) -> None:
        await self._change(
            datasets.delete().where(
                *is_dataset(project, dataset_id), datasets.c.state == DatasetState.DELETING.value
            )
        )


def _row(dataset: Dataset, request_key: str) -> dict[str, Any]:
    return {
        **{name: getattr(dataset, name) for name in rows.PLAIN},
        "state": dataset.state.value,
        "report": asdict(dataset.report) if dataset.report is not None else None,
        "request_key": request_key or None,
        "preparation": to_json(dataset.preparation) if dataset.preparation is not None else None,
        "frozen_as": dataset.frozen_as or None,
        "source_sha256": dataset.source_sha256,
        "source_size_bytes": dataset.source_size_bytes,
        "import_options": asdict(dataset.import_options) if dataset.import_options is not None else None,
    }
