"""Audits in SQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from lathe.common.db import is_unique_violation
from lathe.datasets.model import Audit, AuditResult, AuditState, AuditTask, Report
from lathe.datasets.store import rows
from lathe.datasets.store.base import LIVE, Base
from lathe.datasets.tables import audits, claims, datasets

AUDIT_CLAIM = "audit:"
# A database takes only so many values in one statement.
_AT_ONCE = 500

_RUNNING = audits.c.state == AuditState.RUNNING.value


class Audits(Base):
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
        return rows.audit(row) if row is not None else None

    async def use_tokens(self, digests: Sequence[str], now: datetime) -> None:
        for start in range(0, len(digests), _AT_ONCE):
            some = digests[start : start + _AT_ONCE]
            await self._change(audits.update().where(audits.c.sha256.in_(some)).values(use_time=now))

    async def is_audit_of(self, key: str, dataset_sha256: str) -> bool:
        query = sa.select(audits.c.key).where(audits.c.key == key, audits.c.dataset_sha256 == dataset_sha256)
        async with self._db.read() as connection:
            return (await connection.execute(query)).first() is not None

    async def audit_task(self, key: str) -> AuditTask | None:
        async with self._db.read() as connection:
            row = (await connection.execute(audits.select().where(audits.c.key == key))).one_or_none()
        return rows.task(row) if row is not None else None

    async def running_audits(self) -> Sequence[AuditTask]:
        query = audits.select().where(_RUNNING).order_by(audits.c.create_time, audits.c.key)
        async with self._db.read() as connection:
            return [rows.task(row) for row in await connection.execute(query)]

    async def count_audits(self) -> Mapping[AuditState, int]:
        query = sa.select(audits.c.state, sa.func.count()).group_by(audits.c.state)
        async with self._db.read() as connection:
            found = {AuditState(row[0]): int(row[1]) for row in await connection.execute(query)}
        return {state: found.get(state, 0) for state in AuditState}

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
            audits.c.dataset_sha256.not_in(sa.select(datasets.c.sha256).where(LIVE)),
        )
        async with self._db.read() as connection:
            return [row.key for row in await connection.execute(query)]

    async def begin_remove_audit(self, key: str, unused_since: datetime) -> None:
        standing = sa.select(datasets.c.sha256).where(LIVE)
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
        self,
        *,
        begins: int | None = None,
        unused_since: datetime | None = None,
        dataset_sha256: str | None = None,
    ) -> None:
        query = audits.delete().where(audits.c.state == AuditState.FAILED.value)
        if begins is not None:
            query = query.where(audits.c.begins < begins)
        if unused_since is not None:
            query = query.where(audits.c.use_time < unused_since)
        if dataset_sha256 is not None:
            query = query.where(audits.c.dataset_sha256 == dataset_sha256)
        await self._change(query)
