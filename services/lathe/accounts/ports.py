"""What accounts needs from outside."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from lathe.accounts.model import ApiKey, Identity, Project


class AccountStore(Protocol):
    """The projects and keys that are kept."""

    async def add_project(self, project: Project, request_id: str) -> Project:
        """Keep a new project, or answer with the one that the same request_id made.

        Raises AlreadyExists for a taken id.
        """
        ...

    async def get_project(self, project_id: str) -> Project | None: ...

    async def list_projects(self, *, after: str, limit: int) -> Sequence[Project]:
        """By id, the ones after `after`."""
        ...

    async def update_project(self, project: Project, expected_version: int) -> bool:
        """Write it over `expected_version`; False if that is no longer the current one."""
        ...

    async def add_key(self, key: ApiKey, secret_hash: str, request_id: str) -> tuple[ApiKey, bool]:
        """Keep a new key; (key, True). (the earlier key, False) for a request_id seen before."""
        ...

    async def add_first_key(self, key: ApiKey, secret_hash: str) -> bool:
        """Keep a key only if no key has ever been kept."""
        ...

    async def get_key(self, project_id: str, key_id: str) -> ApiKey | None: ...

    async def list_keys(self, project_id: str, *, after: str, limit: int) -> Sequence[ApiKey]:
        """By id, the ones after `after`; revoked ones too."""
        ...

    async def revoke_key(self, project_id: str, key_id: str, now: datetime) -> ApiKey | None:
        """Mark it revoked; the time of an earlier revocation stays. None if there is no such key."""
        ...

    async def find_secret(self, secret_hash: str) -> Identity | None:
        """The key with this secret, unless it was revoked."""
        ...
