"""Who needs a blob, and who is about to delete it, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from lathe.common.db import is_unique_violation
from lathe.datasets.model import CLAIM_LEASE
from lathe.datasets.store.base import LIVE, Base
from lathe.datasets.tables import audits, claims, datasets


class Blobs(Base):
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
        by_dataset = sa.select(datasets.c.id).where(LIVE, datasets.c.sha256 == sha256).limit(1)
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
        query = sa.select(claims.c.sha256).where(claims.c.sha256 == sha256)
        async with self._db.read() as connection:
            return (await connection.execute(query)).first() is not None


def _left(taken_before: datetime) -> sa.ColumnElement[bool]:
    """Claims that nobody works on: whose removal is still to begin, or broke off."""
    return sa.or_(claims.c.holder == "", claims.c.time < taken_before)


def _held(sha256: str, holder: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return claims.c.sha256 == sha256, claims.c.holder == holder
