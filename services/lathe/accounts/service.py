"""The use cases of accounts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lathe.accounts import model
from lathe.accounts.model import ApiKey, Identity, Project, Quota
from lathe.accounts.ports import AccountStore
from lathe.common.clock import Clock
from lathe.common.errors import Aborted, NotFound, Unauthenticated
from lathe.common.ids import IdFactory
from lathe.common.rpc.principal import DEFAULT_PROJECT

log = logging.getLogger(__name__)

UPDATABLE = ("display_name", "quota", "quota.max_running_jobs", "quota.max_queued_jobs")


@dataclass(frozen=True, slots=True)
class AccountsService:
    """Projects, keys, and who a key is."""

    store: AccountStore
    clock: Clock
    ids: IdFactory

    async def bootstrap(self, secret: str | None) -> None:
        """Make the default project, and its first key while no key has ever existed.

        A later value is ignored with one log line: a revoked first key must stay revoked.
        """
        now = self.clock.now()
        await self.store.add_project(
            Project(DEFAULT_PROJECT, "Default project", Quota(), now), request_id="bootstrap"
        )
        if secret is None:
            return
        model.check_bootstrap_key(secret)
        key = ApiKey(DEFAULT_PROJECT, self.ids.new("key"), "First key", "admin", secret[-4:], now)
        if await self.store.add_first_key(key, model.hash_secret(secret)):
            log.info("The first API key was made from the bootstrap key.")
        elif await self.store.find_secret(model.hash_secret(secret)) is None:
            log.warning("The bootstrap key is ignored: keys exist already, or it was revoked.")

    async def authenticate(self, secret: str) -> Identity:
        """Who this secret is. Raises Unauthenticated, in the same words for unknown and revoked keys."""
        identity = await self.store.find_secret(model.hash_secret(secret))
        if identity is None:
            raise Unauthenticated(
                "The API key is wrong or was revoked. Ask an admin of the project for a new one.",
                reason="INVALID_API_KEY",
            )
        return identity

    async def create_project(
        self, project_id: str, display_name: str, quota: Quota, request_id: str
    ) -> Project:
        """A new project. Raises AlreadyExists, InvalidArgument."""
        model.check_project_id(project_id)
        model.check_display_name(display_name, "project.display_name")
        model.check_quota(quota)
        project = Project(project_id, display_name or project_id, quota, self.clock.now())
        return await self.store.add_project(project, request_id)

    async def get_project(self, project_id: str) -> Project:
        """Raises NotFound."""
        project = await self.store.get_project(project_id)
        if project is None:
            raise NotFound(f"projects/{project_id} was not found.")
        return project

    async def list_projects(self, *, after: str, limit: int) -> Sequence[Project]:
        """By id, the ones after `after`."""
        return await self.store.list_projects(after=after, limit=limit)

    async def update_project(
        self, changed: Project, paths: Sequence[str], expected_version: int | None
    ) -> Project:
        """Change the named paths only.

        Raises NotFound, InvalidArgument for a path that cannot be changed, Aborted when somebody else was quicker.
        """
        for path in paths:
            if path not in UPDATABLE:
                raise model.invalid(
                    "update_mask", f"update_mask: {path!r} cannot be updated; {', '.join(UPDATABLE)} can."
                )
        current = await self.get_project(changed.id)
        if expected_version is not None and expected_version != current.version:
            raise _changed(changed.id)
        updated = _merge(current, changed, paths)
        model.check_display_name(updated.display_name, "project.display_name")
        model.check_quota(updated.quota)
        if not await self.store.update_project(updated, current.version):
            raise _changed(changed.id)
        return updated

    async def create_key(
        self, project_id: str, display_name: str, role: str, request_id: str
    ) -> tuple[ApiKey, str]:
        """A new key and its secret; the secret is empty when request_id was seen before.

        Raises NotFound for an unknown project, InvalidArgument.
        """
        model.check_role(role)
        model.check_display_name(display_name, "api_key.display_name")
        await self.get_project(project_id)
        secret = model.SECRET_PREFIX + self.ids.token()
        key = ApiKey(project_id, self.ids.new("key"), display_name, role, secret[-4:], self.clock.now())
        kept, is_new = await self.store.add_key(key, model.hash_secret(secret), request_id)
        return kept, secret if is_new else ""

    async def get_key(self, project_id: str, key_id: str) -> ApiKey:
        """Raises NotFound."""
        key = await self.store.get_key(project_id, key_id)
        if key is None:
            raise NotFound(f"projects/{project_id}/apiKeys/{key_id} was not found.")
        return key

    async def list_keys(self, project_id: str, *, after: str, limit: int) -> Sequence[ApiKey]:
        """By id, the ones after `after`; revoked ones too."""
        return await self.store.list_keys(project_id, after=after, limit=limit)

    async def revoke_key(self, project_id: str, key_id: str) -> ApiKey:
        """Revoke for ever; again is no error. Raises NotFound."""
        key = await self.store.revoke_key(project_id, key_id, self.clock.now())
        if key is None:
            raise NotFound(f"projects/{project_id}/apiKeys/{key_id} was not found.")
        return key


def _merge(current: Project, changed: Project, paths: Sequence[str]) -> Project:
    quota = current.quota
    if "quota" in paths:
        quota = changed.quota
    if "quota.max_running_jobs" in paths:
        quota = replace(quota, max_running_jobs=changed.quota.max_running_jobs)
    if "quota.max_queued_jobs" in paths:
        quota = replace(quota, max_queued_jobs=changed.quota.max_queued_jobs)
    name = changed.display_name if "display_name" in paths else current.display_name
    return replace(current, display_name=name, quota=quota, version=current.version + 1)


def _changed(project_id: str) -> Aborted:
    return Aborted(f"projects/{project_id} was changed meanwhile. Get it again and repeat the update.")
