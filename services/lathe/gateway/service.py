"""Deployments: names that clients call, and the model ids behind them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lathe.common.clock import Clock
from lathe.common.errors import Aborted, FieldViolation, InvalidArgument, NotFound
from lathe.common.names import BASE_MODEL, DEPLOYMENT, PROJECT
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from lathe.common.rpc.principal import Principal, Role
from lathe.gateway.auth import demand_role
from lathe.gateway.model import Deployment, check_deployment_id
from lathe.gateway.ports import DeploymentStore, ModelResolver

_UPDATABLE = frozenset({"model_id"})


class DeploymentService:
    """The use cases. Another project's deployment is NotFound, as if it did not exist."""

    def __init__(self, store: DeploymentStore, models: ModelResolver, clock: Clock) -> None:
        self._store = store
        self._models = models
        self._clock = clock

    async def create(
        self,
        principal: Principal,
        deployment_id: str,
        model_id: str,
        request_id: str = "",
        *,
        parent: str | None = None,
    ) -> Deployment:
        """Raises InvalidArgument, NotFound for an unknown model, AlreadyExists."""
        self._own(principal, parent, PROJECT.parse(parent, field="parent")[0] if parent else None)
        demand_role(principal, Role.MEMBER)
        check_deployment_id(deployment_id)
        await self._check_model(principal, model_id)
        await self._check_not_base(principal, deployment_id)
        now = self._clock.now()
        name = DEPLOYMENT.format(principal.project, deployment_id)
        return await self._store.add(Deployment(name, model_id, now, now), request_id)

    async def get(self, principal: Principal, name: str) -> Deployment:
        """Raises NotFound."""
        self._own(principal, name, DEPLOYMENT.parse(name)[0])
        found = await self._store.get(name)
        if found is None:
            raise _missing(name)
        return found

    async def list(
        self, principal: Principal, parent: str, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[Deployment], str]:
        """One page by name, and the token of the next (empty at the end)."""
        self._own(principal, parent, PROJECT.parse(parent, field="parent")[0])
        query = {"parent": parent}
        size = coerce_page_size(page_size)
        cursor = decode_page_token(page_token, query)
        rows = await self._store.list(
            principal.project, after=str(cursor[0]) if cursor else "", limit=size + 1
        )
        page = list(rows[:size])
        token = encode_page_token([page[-1].name], query) if len(rows) > size else ""
        return page, token

    async def update(
        self,
        principal: Principal,
        name: str,
        model_id: str,
        paths: Collection[str] = ("model_id",),
        etag: str = "",
    ) -> Deployment:
        """Raises Aborted when `etag` is given and stale, or when another update came in between."""
        demand_role(principal, Role.MEMBER)
        unknown = sorted(set(paths) - _UPDATABLE - {"*"})
        if unknown:
            message = f"update_mask names {', '.join(unknown)}; only model_id can be changed."
            raise InvalidArgument(message, violations=[FieldViolation("update_mask", message)])
        current = await self.get(principal, name)
        _check_etag(current, etag)
        await self._check_model(principal, model_id)
        changed = replace(
            current, model_id=model_id, update_time=self._clock.now(), version=current.version + 1
        )
        if not await self._store.update(changed, current.version):
            raise _stale(name)
        return changed

    async def delete(self, principal: Principal, name: str, etag: str = "") -> None:
        """Raises NotFound, Aborted when `etag` is given and stale."""
        demand_role(principal, Role.MEMBER)
        current = await self.get(principal, name)
        _check_etag(current, etag)
        if not await self._store.delete(name, current.version if etag else None):
            raise _stale(name) if etag else _missing(name)

    @staticmethod
    def _own(principal: Principal, name: str | None, project: str | None) -> None:
        if project is not None and project != principal.project:
            raise NotFound(f"{name} was not found.")

    async def _check_model(self, principal: Principal, model_id: str) -> None:
        if not model_id:
            message = "deployment.model_id must be the id of a base model or a tuned model."
            raise InvalidArgument(message, violations=[FieldViolation("deployment.model_id", message)])
        await self._models.resolve(principal, model_id)

    async def _check_not_base(self, principal: Principal, deployment_id: str) -> None:
        """A deployment of that name would hide the base model from its own project."""
        try:
            await self._models.resolve(principal, BASE_MODEL.format(deployment_id))
        except NotFound:
            return
        message = f"deployment_id {deployment_id!r} is a base model's id; choose another."
        raise InvalidArgument(message, violations=[FieldViolation("deployment_id", message)])


def _check_etag(current: Deployment, etag: str) -> None:
    if etag and etag != current.etag:
        raise _stale(current.name)


def _stale(name: str) -> Aborted:
    return Aborted(f"{name} has changed since it was read; read it again.", reason="ETAG_MISMATCH")


def _missing(name: str) -> NotFound:
    return NotFound(f"{name} was not found.")
