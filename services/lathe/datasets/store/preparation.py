"""Datasets whose rows are looked at: their indexes, those made of others, held-out sets and what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from lathe.common.db import is_unique_violation
from lathe.common.errors import AlreadyExists
from lathe.datasets.model import Dataset, DatasetState, Overlap
from lathe.datasets.store import rows
from lathe.datasets.store.base import LIVE, TRAINING_FILE, is_dataset
from lathe.datasets.store.datasets import Datasets
from lathe.datasets.tables import datasets, overlaps

_UNWRITTEN = sa.and_(
    datasets.c.state == DatasetState.VALIDATING.value,
    datasets.c.preparation.is_not(None),
    datasets.c.sha256 == "",
)


class Preparation(Datasets):
    async def training_files(self, project: str) -> Sequence[Dataset]:
        query = datasets.select().where(TRAINING_FILE, datasets.c.project == project)
        return await self._select(query.order_by(datasets.c.create_time, datasets.c.id))

    async def to_index(self, version: int) -> Sequence[str]:
        query = sa.select(datasets.c.sha256).where(TRAINING_FILE, datasets.c.index_version != version)
        size = sa.func.min(datasets.c.size_bytes)
        query = query.group_by(datasets.c.sha256).order_by(size, datasets.c.sha256)
        async with self._db.read() as connection:
            return [str(row.sha256) for row in await connection.execute(query)]

    async def set_indexed(self, sha256: str, version: int) -> bool:
        # Only READY ones: what is still validated may wait for a deletion of the same content, index and all.
        return await self._change(
            datasets.update().where(TRAINING_FILE, datasets.c.sha256 == sha256).values(index_version=version)
        )

    async def unset_indexed(self, sha256: str) -> bool:
        return await self._change(
            datasets.update().where(TRAINING_FILE, datasets.c.sha256 == sha256).values(index_version=0)
        )

    async def unwritten(self) -> Sequence[Dataset]:
        query = datasets.select().where(_UNWRITTEN)
        return await self._select(query.order_by(datasets.c.create_time, datasets.c.id))

    async def set_written(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        return await self._change(
            datasets.update()
            .where(_UNWRITTEN, *is_dataset(project, dataset_id))
            .values(size_bytes=size_bytes, sha256=sha256)
        )

    async def freeze(self, project: str, dataset_id: str, name: str) -> bool:
        free = sa.or_(datasets.c.frozen_as.is_(None), datasets.c.frozen_as == name)
        try:
            return await self._change(
                datasets.update()
                .where(TRAINING_FILE, free, *is_dataset(project, dataset_id))
                .values(frozen_as=name, expire_time=None)
            )
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(
                f"Another dataset is frozen as {name!r}; take another name.", reason="FROZEN_NAME_TAKEN"
            ) from error

    async def thaw(self, project: str, dataset_id: str) -> None:
        await self._change(datasets.update().where(*is_dataset(project, dataset_id)).values(frozen_as=None))

    async def frozen(self, project: str) -> Sequence[Dataset]:
        query = datasets.select().where(LIVE, datasets.c.project == project)
        return await self._select(
            query.where(datasets.c.frozen_as.is_not(None)).order_by(datasets.c.frozen_as)
        )

    async def overlap(self, frozen_sha256: str, dataset_sha256: str) -> Overlap:
        pair = {"frozen_sha256": frozen_sha256, "dataset_sha256": dataset_sha256}
        query = overlaps.select().filter_by(**pair)
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is not None:
            return rows.overlap(row)
        try:
            await self._change(overlaps.insert().values(**pair, count=None, lines=[]))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        return Overlap(frozen_sha256, dataset_sha256)

    async def overlaps_to_find(self) -> Sequence[Overlap]:
        query = overlaps.select().where(overlaps.c.count.is_(None))
        async with self._db.read() as connection:
            return [rows.overlap(row) for row in await connection.execute(query)]

    async def set_overlap(self, overlap: Overlap) -> None:
        await self._change(
            overlaps.update()
            .where(
                overlaps.c.frozen_sha256 == overlap.frozen_sha256,
                overlaps.c.dataset_sha256 == overlap.dataset_sha256,
            )
            .values(count=overlap.count, lines=list(overlap.lines))
        )

    async def forget_overlaps(self) -> None:
        kept = sa.select(datasets.c.sha256).where(LIVE)
        gone = [column.not_in(kept) for column in (overlaps.c.frozen_sha256, overlaps.c.dataset_sha256)]
        await self._change(overlaps.delete().where(sa.or_(*gone)))
