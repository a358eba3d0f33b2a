"""Datasets and audits in SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from lathe.common.db import Database, is_unique_violation
from lathe.common.errors import AlreadyExists, Internal
from lathe.datasets.model import (
    CLAIM_LEASE,
    RESULTS_PURPOSE,
    Audit,
    AuditOptions,
    AuditResult,
    AuditState,
    AuditTask,
    Dataset,
    DatasetState,
    Distribution,
    ImportOptions,
    Overlap,
    Report,
    Share,
    Statistics,
    TokenizerFile,
)
from lathe.datasets.operations import from_json, to_json
from lathe.datasets.tables import audits, claims, datasets, overlaps, uploads
from lathe.text.filekinds import FileType
from lathe.text.findings import Finding, FindingGroup, tally_of
from lathe.text.formats import Layout, RowFormat

AUDIT_CLAIM = "audit:"

_LIVE = datasets.c.state != DatasetState.DELETING.value
_TRAINING_FILE = sa.and_(datasets.c.state == DatasetState.READY.value, datasets.c.purpose == "fine-tune")
_UNWRITTEN = sa.and_(
    datasets.c.state == DatasetState.VALIDATING.value,
    datasets.c.preparation.is_not(None),
    datasets.c.sha256 == "",
)
_RUNNING = audits.c.state == AuditState.RUNNING.value


class SqlDatasetStore:
    """DatasetStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- datasets ---------------------------------------------------------------------------------------------

    async def add(self, dataset: Dataset, request_key: str) -> Dataset:
        row = {
            **{name: getattr(dataset, name) for name in _PLAIN},
            "state": dataset.state.value,
            "report": asdict(dataset.report) if dataset.report is not None else None,
            "request_key": request_key or None,
            "preparation": to_json(dataset.preparation) if dataset.preparation is not None else None,
            "frozen_as": dataset.frozen_as or None,
            "source_sha256": dataset.source_sha256,
            "source_size_bytes": dataset.source_size_bytes,
            "import_options": asdict(dataset.import_options) if dataset.import_options is not None else None,
        }
        try:
            async with self._db.write() as connection:
                await connection.execute(datasets.insert().values(row))
            return dataset
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        earlier = await self.find_by_request(dataset.project, request_key) if request_key else None
        if earlier is None:
            raise Internal(f"{dataset.name} is there already.")
        return earlier

    async def get(self, project: str, dataset_id: str) -> Dataset | None:
        found = await self._select(datasets.select().where(_LIVE, *_is(project, dataset_id)))
        return found[0] if found else None

    async def find_by_request(self, project: str, request_key: str) -> Dataset | None:
        query = datasets.select().where(
            _LIVE, datasets.c.project == project, datasets.c.request_key == request_key
        )
        found = await self._select(query)
        return found[0] if found else None

    async def page(
        self, project: str, *, purpose: str, after: tuple[datetime, str] | None, ascending: bool, limit: int
    ) -> Sequence[Dataset]:
        time, id_ = datasets.c.create_time, datasets.c.id
        query = datasets.select().where(_LIVE, datasets.c.project == project)
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
            datasets.c.state == DatasetState.UPLOADING.value, datasets.c.create_time < abandoned_before
        )
        return await self._select(
            datasets.select().where(_LIVE, sa.or_(datasets.c.expire_time <= now, abandoned))
        )

    async def count(self) -> Mapping[DatasetState, int]:
        query = sa.select(datasets.c.state, sa.func.count()).group_by(datasets.c.state)
        async with self._db.read() as connection:
            found = {DatasetState(row[0]): int(row[1]) for row in await connection.execute(query)}
        return {state: found.get(state, 0) for state in DatasetState}

    async def _select(self, query: sa.Select[Any]) -> list[Dataset]:
        async with self._db.read() as connection:
            return [_dataset(row) for row in await connection.execute(query)]

    async def begin_validation(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        # Jobs may repeat the call that makes a results file with other bytes while it is not READY.
        repeated = sa.and_(
            datasets.c.state == DatasetState.VALIDATING.value, datasets.c.purpose == RESULTS_PURPOSE
        )
        return await self._change(
            datasets.update()
            .where(
                *_is(project, dataset_id),
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
            .where(*_is(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
            .values(sha256=sha256)
        )

    async def note_conversion(
        self, project: str, dataset_id: str, stored: tuple[str, int], uploaded: tuple[str, int]
    ) -> bool:
        return await self._change(
            datasets.update()
            .where(*_is(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
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
            .where(*_is(project, dataset_id), datasets.c.state == DatasetState.VALIDATING.value)
            .values(state=state.value, sha256=sha256, report=asdict(report) if report is not None else None)
        )

    async def clear_staging(self, project: str, dataset_id: str) -> None:
        await self._change(datasets.update().where(*_is(project, dataset_id)).values(staging_key=""))

    async def begin_delete(self, project: str, dataset_id: str) -> bool:
        return await self._change(
            datasets.update()
            .where(_LIVE, datasets.c.frozen_as.is_(None), *_is(project, dataset_id))
            .values(state=DatasetState.DELETING.value, request_key=None)
        )

    async def remove(self, project: str, dataset_id: str) -> None:
        await self._change(
            datasets.delete().where(
                *_is(project, dataset_id), datasets.c.state == DatasetState.DELETING.value
            )
        )

    async def _change(self, statement: sa.Update | sa.Delete | sa.Insert) -> bool:
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount > 0

    # --- rows -------------------------------------------------------------------------------------------------

    async def training_files(self, project: str) -> Sequence[Dataset]:
        query = datasets.select().where(_TRAINING_FILE, datasets.c.project == project)
        return await self._select(query.order_by(datasets.c.create_time, datasets.c.id))

    async def to_index(self, version: int) -> Sequence[str]:
        oldest = sa.func.min(datasets.c.create_time)
        query = sa.select(datasets.c.sha256).where(_TRAINING_FILE, datasets.c.index_version != version)
        query = query.group_by(datasets.c.sha256).order_by(oldest, datasets.c.sha256)
        async with self._db.read() as connection:
            return [str(row.sha256) for row in await connection.execute(query)]

    async def set_indexed(self, sha256: str, version: int) -> bool:
        # Only READY ones: what is still validated may wait for a deletion of the same content, index and all.
        return await self._change(
            datasets.update().where(_TRAINING_FILE, datasets.c.sha256 == sha256).values(index_version=version)
        )

    async def unset_indexed(self, sha256: str) -> bool:
        return await self._change(
            datasets.update().where(_TRAINING_FILE, datasets.c.sha256 == sha256).values(index_version=0)
        )

    async def unwritten(self) -> Sequence[Dataset]:
        query = datasets.select().where(_UNWRITTEN)
        return await self._select(query.order_by(datasets.c.create_time, datasets.c.id))

    async def set_written(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        return await self._change(
            datasets.update()
            .where(_UNWRITTEN, *_is(project, dataset_id))
            .values(size_bytes=size_bytes, sha256=sha256)
        )

    async def freeze(self, project: str, dataset_id: str, name: str) -> bool:
        free = sa.or_(datasets.c.frozen_as.is_(None), datasets.c.frozen_as == name)
        try:
            return await self._change(
                datasets.update()
                .where(_TRAINING_FILE, free, *_is(project, dataset_id))
                .values(frozen_as=name, expire_time=None)
            )
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(
                f"Another dataset is frozen as {name!r}; take another name.", reason="FROZEN_NAME_TAKEN"
            ) from error

    async def thaw(self, project: str, dataset_id: str) -> None:
        await self._change(datasets.update().where(*_is(project, dataset_id)).values(frozen_as=None))

    async def frozen(self, project: str) -> Sequence[Dataset]:
        query = datasets.select().where(_LIVE, datasets.c.project == project)
        return await self._select(
            query.where(datasets.c.frozen_as.is_not(None)).order_by(datasets.c.frozen_as)
        )

    async def overlap(self, frozen_sha256: str, dataset_sha256: str) -> Overlap:
        pair = {"frozen_sha256": frozen_sha256, "dataset_sha256": dataset_sha256}
        query = overlaps.select().filter_by(**pair)
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is not None:
            return _overlap(row)
        try:
            await self._change(overlaps.insert().values(**pair, count=None, lines=[]))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        return Overlap(frozen_sha256, dataset_sha256)

    async def overlaps_to_find(self) -> Sequence[Overlap]:
        query = overlaps.select().where(overlaps.c.count.is_(None))
        async with self._db.read() as connection:
            return [_overlap(row) for row in await connection.execute(query)]

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
        kept = sa.select(datasets.c.sha256).where(_LIVE)
        gone = [column.not_in(kept) for column in (overlaps.c.frozen_sha256, overlaps.c.dataset_sha256)]
        await self._change(overlaps.delete().where(sa.or_(*gone)))

    # --- blobs ------------------------------------------------------------------------------------------------

    async def claim_blob(self, sha256: str, owner: str, holder: str, now: datetime) -> bool:
        mine = {"owner": owner, "holder": holder, "time": now}
        try:
            await self._change(claims.insert().values(sha256=sha256, **mine))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            left = _left(now - CLAIM_LEASE)
            if not await self._change(claims.update().where(claims.c.sha256 == sha256, left).values(mine)):
                return False
        by_dataset = sa.select(datasets.c.id).where(_LIVE, datasets.c.sha256 == sha256).limit(1)
        of_audit = sa.or_(audits.c.sha256 == sha256, audits.c.findings_sha256 == sha256)
        by_audit = sa.select(audits.c.key).where(of_audit).limit(1)
        # Another transaction than the claim's: the claim must be seen by others before this one looks for them.
        async with self._db.write() as connection:
            needed = (await connection.execute(by_dataset)).first() or (
                await connection.execute(by_audit)
            ).first()
            if needed is None:
                return True
            await connection.execute(claims.delete().where(*_held(sha256, holder)))
        return False

    async def release_blob(self, sha256: str, holder: str) -> None:
        await self._change(claims.delete().where(*_held(sha256, holder)))

    async def left_claims(self, now: datetime) -> Sequence[tuple[str, str]]:
        query = sa.select(claims.c.sha256, claims.c.owner).where(_left(now - CLAIM_LEASE))
        async with self._db.read() as connection:
            return [(row.sha256, row.owner) for row in await connection.execute(query)]

    async def unnamed(self, digests: Sequence[str]) -> set[str]:
        named: set[str] = set()
        async with self._db.read() as connection:
            for column in (datasets.c.sha256, audits.c.sha256, audits.c.findings_sha256, claims.c.sha256):
                query = sa.select(column).where(column.in_(digests))
                named.update((await connection.execute(query)).scalars())
        return set(digests) - named

    async def unnamed_staging(self, keys: Sequence[str]) -> set[str]:
        query = sa.select(datasets.c.staging_key).where(datasets.c.staging_key.in_(keys))
        async with self._db.read() as connection:
            return set(keys) - {row.staging_key for row in await connection.execute(query)}

    async def is_claimed(self, sha256: str) -> bool:
        return await self._claimant(sha256) is not None

    async def _claimant(self, sha256: str) -> str | None:
        async with self._db.read() as connection:
            query = sa.select(claims.c.owner).where(claims.c.sha256 == sha256)
            owner: str | None = (await connection.execute(query)).scalar_one_or_none()
        return owner

    # --- audits -----------------------------------------------------------------------------------------------

    async def add_audit(self, task: AuditTask) -> None:
        row = {
            "key": task.key,
            "state": AuditState.RUNNING.value,
            "dataset_sha256": task.dataset_sha256,
            "base_model": task.base_model,
            "tokenizer_digest": task.tokenizer_digest,
            "template_digest": task.template_digest,
            "options": asdict(task.options),
            "files": [asdict(file) for file in task.files],
            "create_time": task.now,
            "use_time": task.now,
            "report": asdict(Report()),
            "compared": list(task.compared) if task.compared is not None else None,
            **asdict(AuditResult()),
        }
        try:
            await self._change(audits.insert().values(row))
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise

    async def get_audit(self, key: str, now: datetime) -> Audit | None:
        async with self._db.write() as connection:
            await connection.execute(audits.update().where(audits.c.key == key).values(use_time=now))
            row = (await connection.execute(audits.select().where(audits.c.key == key))).one_or_none()
        return _audit(row) if row is not None else None

    async def is_audit_of(self, key: str, dataset_sha256: str) -> bool:
        query = sa.select(audits.c.key).where(audits.c.key == key, audits.c.dataset_sha256 == dataset_sha256)
        async with self._db.read() as connection:
            return (await connection.execute(query)).first() is not None

    async def audit_task(self, key: str) -> AuditTask | None:
        async with self._db.read() as connection:
            row = (await connection.execute(audits.select().where(audits.c.key == key))).one_or_none()
        return _task(row) if row is not None else None

    async def running_audits(self) -> Sequence[AuditTask]:
        query = audits.select().where(_RUNNING).order_by(audits.c.create_time, audits.c.key)
        async with self._db.read() as connection:
            return [_task(row) for row in await connection.execute(query)]

    async def begin_audit(self, key: str) -> int:
        begun = (
            audits.update()
            .where(audits.c.key == key, _RUNNING)
            .values(begins=audits.c.begins + 1)
            .returning(audits.c.begins)
        )
        async with self._db.write() as connection:
            return (await connection.execute(begun)).scalar_one_or_none() or 0

    async def end_audit_try(self, key: str) -> None:
        await self._change(audits.update().where(audits.c.key == key, _RUNNING).values(begins=0))

    async def set_audit_objects(self, key: str, sha256: str, findings_sha256: str) -> None:
        values = {"sha256": sha256, "findings_sha256": findings_sha256}
        await self._change(audits.update().where(audits.c.key == key, _RUNNING).values(values))

    async def finish_audit(self, key: str, state: AuditState, report: Report, result: AuditResult) -> None:
        await self._change(
            audits.update()
            .where(audits.c.key == key, _RUNNING)
            .values(state=state.value, report=asdict(report), **asdict(result))
        )

    async def unneeded_audits(self, unused_since: datetime) -> Sequence[str]:
        query = sa.select(audits.c.key).where(
            ~_RUNNING,
            audits.c.use_time < unused_since,
            audits.c.dataset_sha256.not_in(sa.select(datasets.c.sha256).where(_LIVE)),
        )
        async with self._db.read() as connection:
            return [row.key for row in await connection.execute(query)]

    async def begin_remove_audit(self, key: str, unused_since: datetime) -> None:
        standing = sa.select(datasets.c.sha256).where(_LIVE)
        await self._remove_audit(
            audits.c.key == key,
            ~_RUNNING,
            audits.c.use_time < unused_since,
            audits.c.dataset_sha256.not_in(standing),
        )

    async def drop_running_audit(self, key: str) -> None:
        await self._remove_audit(audits.c.key == key, _RUNNING)

    async def _remove_audit(self, *where: sa.ColumnElement[bool]) -> None:
        query = audits.select().where(*where).with_for_update()
        try:
            async with self._db.write() as connection:
                row = (await connection.execute(query)).one_or_none()
                if row is None:
                    return
                for sha256 in filter(None, (row.sha256, row.findings_sha256)):
                    claim = {"sha256": sha256, "owner": AUDIT_CLAIM + row.key}
                    await connection.execute(claims.insert().values(claim))
                await connection.execute(audits.delete().where(audits.c.key == row.key))
        except sa.exc.IntegrityError as error:
            # Somebody else is deleting that very blob: this audit's turn comes later.
            if not is_unique_violation(error):
                raise

    async def forget_failed_audits(
        self, *, begins: int | None = None, unused_since: datetime | None = None
    ) -> None:
        query = audits.delete().where(audits.c.state == AuditState.FAILED.value)
        if begins is not None:
            query = query.where(audits.c.begins < begins)
        if unused_since is not None:
            query = query.where(audits.c.use_time < unused_since)
        await self._change(query)


_PLAIN = (
    "id", "project", "display_name", "purpose", "create_time", "expire_time", "size_bytes", "sha256", "staging_key",
    "source",
)  # fmt: skip


def _left(taken_before: datetime) -> sa.ColumnElement[bool]:
    """Claims that nobody works on: whose removal is still to begin, or broke off."""
    return sa.or_(claims.c.holder == "", claims.c.time < taken_before)


def _held(sha256: str, holder: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return claims.c.sha256 == sha256, claims.c.holder == holder


def _is(project: str, dataset_id: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return datasets.c.project == project, datasets.c.id == dataset_id


def _report(content: Mapping[str, Any]) -> Report:
    findings = tuple(Finding(**finding) for finding in content["findings"])
    # Rows that an earlier version wrote have neither a format nor groups.
    found = content.get("format")
    groups = content.get("groups")
    statistics = content.get("statistics")
    layout = content.get("layout")
    return Report(
        content["example_count"],
        content["finding_count"],
        findings,
        RowFormat(found) if found else None,
        tally_of(findings).groups()
        if groups is None
        else tuple(FindingGroup(item["code"], item["count"], tuple(item["lines"])) for item in groups),
        None if statistics is None else _statistics(statistics),
        Layout(layout) if layout else None,
    )


def _statistics(content: Mapping[str, Any]) -> Statistics:
    """Distributions are objects, shares lists of objects."""
    values: dict[str, Any] = {
        name: Distribution(**value)
        if isinstance(value, Mapping)
        else tuple(Share(**share) for share in value)
        for name, value in content.items()
    }
    return Statistics(**values)


def _dataset(row: Any) -> Dataset:
    report = _report(row.report) if row.report is not None else None
    plain = {name: getattr(row, name) for name in _PLAIN}
    return Dataset(
        **plain,
        state=DatasetState(row.state),
        report=report,
        preparation=from_json(row.preparation) if row.preparation is not None else None,
        frozen_as=row.frozen_as or "",
        import_options=_import_options(row.import_options) if row.import_options is not None else None,
        source_sha256=row.source_sha256,
        source_size_bytes=row.source_size_bytes,
    )


def _import_options(content: Mapping[str, Any]) -> ImportOptions:
    return ImportOptions(FileType(content["file_type"]), content["columns"])


def _overlap(row: Any) -> Overlap:
    return Overlap(row.frozen_sha256, row.dataset_sha256, row.count, tuple(row.lines))


def _audit(row: Any) -> Audit:
    result = AuditResult(
        row.sha256,
        row.rows,
        row.tokens,
        row.trained_tokens,
        row.truncated_rows,
        row.max_row_tokens,
        row.findings_sha256,
    )
    # While RUNNING the digests only reserve the blobs.
    state = AuditState(row.state)
    settled = state in (AuditState.READY, AuditState.ERROR)
    return Audit(row.key, state, _report(row.report), result if settled else AuditResult())


def _task(row: Any) -> AuditTask:
    return AuditTask(
        key=row.key,
        dataset_sha256=row.dataset_sha256,
        base_model=row.base_model,
        tokenizer_digest=row.tokenizer_digest,
        template_digest=row.template_digest,
        options=AuditOptions(**row.options),
        files=tuple(TokenizerFile(**file) for file in row.files),
        now=row.create_time,
        compared=(row.compared[0], row.compared[1]) if row.compared else None,
    )
