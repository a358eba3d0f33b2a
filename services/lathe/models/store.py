"""Base models and adapters in SQL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from lathe.common.db import Database, UtcDateTime, is_unique_violation
from lathe.common.errors import FailedPrecondition, NotFound
from lathe.models.model import Adapter, AdapterObject, BaseModel, BaseModelState, Facts, Lineage, ModelFile
from lathe.models.ports import Finish

metadata = sa.MetaData()

base_models = sa.Table(
    "base_models",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("display_name", sa.Text),
    sa.Column("state", sa.String),
    sa.Column("digest", sa.String),
    sa.Column("ready_digest", sa.String),
    sa.Column("request_key", sa.String),
    sa.Column("license", sa.Text),
    sa.Column("training_cutoff", sa.Text),
    sa.Column("source", sa.Text),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("facts", sa.JSON),
)
files = sa.Table(
    "base_model_files",
    metadata,
    sa.Column("base_model", sa.String, primary_key=True),
    sa.Column("path", sa.String, primary_key=True),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("sha256", sa.String),
    sa.Column("stored", sa.Boolean),
)
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("digest", sa.String, primary_key=True),
    sa.Column("owner", sa.String),
)
adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("model_id", sa.String),
    sa.Column("base_model", sa.String),
    sa.Column("prefix", sa.Text),
    sa.Column("manifest_sha256", sa.String),
    sa.Column("lineage", sa.JSON),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("is_final", sa.Boolean),
    sa.Column("deleting", sa.Boolean),
    # What the version before this one does not know of the lineage, where it takes an unknown member for an error.
    sa.Column("ancestry", sa.JSON(none_as_null=True)),
)

_ANCESTRY = ("method", "parent_model_id", "parent_manifest_sha256")
_LIVE = base_models.c.state != BaseModelState.DELETING.value
_DELETING = base_models.c.state == BaseModelState.DELETING.value


class SqlModelStore:
    """ModelStore on a Database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- base models ------------------------------------------------------------------------------------------

    async def add_base_model(self, model: BaseModel, request_key: str) -> bool:
        row = {
            "id": model.id,
            "display_name": model.display_name,
            "state": model.state.value,
            "digest": model.digest,
            "request_key": request_key or None,
            "license": model.license,
            "training_cutoff": model.training_cutoff,
            "source": model.source,
            "create_time": model.create_time,
            "facts": asdict(model.facts),
        }
        entries = [{"base_model": model.id, **asdict(file)} for file in model.files]
        try:
            async with self._db.write() as connection:
                await connection.execute(base_models.insert().values(row))
                await connection.execute(files.insert(), entries)
            return True
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            return False

    async def get_base_model(self, base_model_id: str) -> BaseModel | None:
        return await self._one(_LIVE, base_models.c.id == base_model_id)

    async def find_by_request(self, request_key: str) -> BaseModel | None:
        return await self._one(_LIVE, base_models.c.request_key == request_key)

    async def find_ready(self, digest: str) -> BaseModel | None:
        return await self._one(_LIVE, base_models.c.ready_digest == digest)

    async def _one(self, *where: sa.ColumnElement[bool]) -> BaseModel | None:
        async with self._db.read() as connection:
            found = await _load(connection, base_models.select().where(*where))
        return found[0] if found else None

    async def list_base_models(self, *, after: str, limit: int) -> Sequence[BaseModel]:
        query = (
            base_models.select()
            .where(_LIVE, base_models.c.id > after)
            .order_by(base_models.c.id)
            .limit(limit)
        )
        async with self._db.read() as connection:
            return await _load(connection, query)

    async def set_stored(self, base_model_id: str, paths: Collection[str]) -> None:
        statement = (
            files.update()
            .where(files.c.base_model == base_model_id, files.c.path.in_(list(paths)))
            .values(stored=True)
        )
        async with self._db.write() as connection:
            await connection.execute(statement)

    async def finish(self, base_model_id: str, facts: Facts) -> Finish:
        statement = (
            base_models.update()
            .where(base_models.c.id == base_model_id, base_models.c.state == BaseModelState.UPLOADING.value)
            .values(state=BaseModelState.READY.value, ready_digest=base_models.c.digest, facts=asdict(facts))
        )
        try:
            async with self._db.write() as connection:
                changed = (await connection.execute(statement)).rowcount
                if changed:
                    await connection.execute(
                        files.update().where(files.c.base_model == base_model_id).values(stored=True)
                    )
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
            return Finish.DUPLICATE
        model = await self.get_base_model(base_model_id)
        return Finish.READY if model is not None and model.state is BaseModelState.READY else Finish.GONE

    async def begin_delete_base_model(self, base_model_id: str) -> bool:
        async with self._db.write() as connection:
            await _lock_base_model(connection, base_model_id)
            used = sa.select(adapters.c.id).where(adapters.c.base_model == base_model_id).limit(1)
            if (await connection.execute(used)).first() is not None:
                return False
            await connection.execute(
                base_models.update()
                .where(base_models.c.id == base_model_id)
                .values(state=BaseModelState.DELETING.value, ready_digest=None, request_key=None)
            )
        return True

    async def deleting_base_models(self) -> Sequence[BaseModel]:
        async with self._db.read() as connection:
            return await _load(connection, base_models.select().where(_DELETING).order_by(base_models.c.id))

    async def abandoned_uploads(self, before: datetime) -> Sequence[str]:
        query = sa.select(base_models.c.id).where(
            base_models.c.state == BaseModelState.UPLOADING.value, base_models.c.create_time < before
        )
        async with self._db.read() as connection:
            return [row.id for row in await connection.execute(query)]

    async def remove_base_model(self, base_model_id: str) -> None:
        async with self._db.write() as connection:
            await connection.execute(claims.delete().where(claims.c.owner == base_model_id))
            await connection.execute(files.delete().where(files.c.base_model == base_model_id))
            await connection.execute(base_models.delete().where(base_models.c.id == base_model_id, _DELETING))

    async def claim(self, digest: str, owner: str) -> bool:
        if not await self._announce(digest, owner):
            return False
        listed = sa.select(files.c.base_model).where(files.c.sha256 == digest)
        needed = sa.select(base_models.c.id).where(
            _LIVE, sa.or_(base_models.c.digest == digest, base_models.c.id.in_(listed))
        )
        # A second transaction: the claim must be seen by others before this one looks for them.
        async with self._db.write() as connection:
            if (await connection.execute(needed.limit(1))).first() is None:
                return True
            await connection.execute(claims.delete().where(claims.c.digest == digest))
        return False

    async def _announce(self, digest: str, owner: str) -> bool:
        try:
            async with self._db.write() as connection:
                await connection.execute(claims.insert().values(digest=digest, owner=owner))
            return True
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        async with self._db.read() as connection:
            query = sa.select(claims.c.owner).where(claims.c.digest == digest)
            return (await connection.execute(query)).scalar_one_or_none() == owner

    async def claimed(self, digests: Collection[str]) -> set[str]:
        query = sa.select(claims.c.digest).where(claims.c.digest.in_(list(digests)))
        async with self._db.read() as connection:
            return {row.digest for row in await connection.execute(query)}

    # --- adapters ---------------------------------------------------------------------------------------------

    async def add_adapter(self, adapter: Adapter) -> Adapter:
        lineage = asdict(adapter.lineage)
        row = {
            "id": adapter.id,
            "project": adapter.project,
            "model_id": adapter.model_id,
            "base_model": adapter.base_model,
            "prefix": adapter.object.prefix,
            "manifest_sha256": adapter.object.manifest_sha256,
            "lineage": {key: value for key, value in lineage.items() if key not in _ANCESTRY},
            "ancestry": {key: lineage[key] for key in _ANCESTRY},
            "create_time": adapter.create_time,
            "is_final": adapter.is_final,
            "deleting": False,
        }
        try:
            async with self._db.write() as connection:
                if await _lock_base_model(connection, adapter.base_model) != BaseModelState.READY.value:
                    raise NotFound(f"baseModels/{adapter.base_model} was not found.")
                await connection.execute(adapters.insert().values(row))
            return adapter
        except sa.exc.IntegrityError as error:
            if not is_unique_violation(error):
                raise
        earlier = await self.find_adapter(adapter.project, adapter.model_id)
        if earlier is None:
            raise FailedPrecondition(f"{adapter.model_id} is being deleted.")
        return earlier

    async def get_adapter(self, project: str, adapter_id: str) -> Adapter | None:
        return await self._adapter(adapters.c.project == project, adapters.c.id == adapter_id)

    async def find_adapter(self, project: str, model_id: str) -> Adapter | None:
        return await self._adapter(adapters.c.project == project, adapters.c.model_id == model_id)

    async def _adapter(self, *where: sa.ColumnElement[bool]) -> Adapter | None:
        query = adapters.select().where(~adapters.c.deleting, *where)
        async with self._db.read() as connection:
            row = (await connection.execute(query)).one_or_none()
        return _adapter(row) if row is not None else None

    async def list_adapters(
        self, project: str, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Adapter]:
        query = adapters.select().where(adapters.c.project == project, ~adapters.c.deleting)
        if after is not None:
            time, id_ = after
            query = query.where(
                sa.or_(
                    adapters.c.create_time > time,
                    sa.and_(adapters.c.create_time == time, adapters.c.id > id_),
                )
            )
        query = query.order_by(adapters.c.create_time, adapters.c.id).limit(limit)
        async with self._db.read() as connection:
            return [_adapter(row) for row in await connection.execute(query)]

    async def adapter_prefixes(self, below: str) -> set[str]:
        query = sa.select(adapters.c.prefix).where(
            ~adapters.c.deleting, adapters.c.prefix.startswith(below, autoescape=True)
        )
        async with self._db.read() as connection:
            return set((await connection.execute(query)).scalars())

    async def begin_delete_adapter(self, project: str, adapter_id: str) -> bool:
        statement = (
            adapters.update()
            .where(adapters.c.project == project, adapters.c.id == adapter_id, ~adapters.c.deleting)
            .values(deleting=True)
        )
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount == 1

    async def deleting_adapters(self) -> Sequence[Adapter]:
        query = adapters.select().where(adapters.c.deleting).order_by(adapters.c.id)
        async with self._db.read() as connection:
            return [_adapter(row) for row in await connection.execute(query)]

    async def remove_adapter(self, project: str, adapter_id: str) -> None:
        statement = adapters.delete().where(
            adapters.c.project == project, adapters.c.id == adapter_id, adapters.c.deleting
        )
        async with self._db.write() as connection:
            await connection.execute(statement)


async def _lock_base_model(connection: AsyncConnection, base_model_id: str) -> str | None:
    """Its state, and nobody else changes the row until the transaction ends."""
    query = sa.select(base_models.c.state).where(base_models.c.id == base_model_id).with_for_update()
    state: str | None = (await connection.execute(query)).scalar_one_or_none()
    return state


async def _load(connection: AsyncConnection, query: sa.Select[Any]) -> list[BaseModel]:
    rows = (await connection.execute(query)).all()
    listed = files.select().where(files.c.base_model.in_([row.id for row in rows])).order_by(files.c.path)
    found: dict[str, list[ModelFile]] = {row.id: [] for row in rows}
    for entry in await connection.execute(listed):
        found[entry.base_model].append(ModelFile(entry.path, entry.size_bytes, entry.sha256, entry.stored))
    return [_base_model(row, found[row.id]) for row in rows]


def _base_model(row: Any, listed: Sequence[ModelFile]) -> BaseModel:
    # JSON knows lists only.
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.facts.items()}
    return BaseModel(
        id=row.id,
        display_name=row.display_name,
        state=BaseModelState(row.state),
        digest=row.digest,
        files=tuple(listed),
        license=row.license,
        training_cutoff=row.training_cutoff,
        source=row.source,
        create_time=row.create_time,
        facts=Facts(**facts),
    )


def _adapter(row: Any) -> Adapter:
    return Adapter(
        project=row.project,
        id=row.id,
        model_id=row.model_id,
        base_model=row.base_model,
        object=AdapterObject(row.prefix, row.manifest_sha256),
        lineage=Lineage(**row.lineage, **(row.ancestry or {})),
        create_time=row.create_time,
        is_final=row.is_final,
    )
