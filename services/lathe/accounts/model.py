"""What accounts is about: projects, their API keys, and the rules that need nothing from outside."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime

from lathe.common.errors import FieldViolation, InvalidArgument

SECRET_PREFIX = "sk-lathe-"
ROLES = ("viewer", "member", "admin")

_PROJECT_ID = re.compile(r"[a-z][a-z0-9-]{1,30}[a-z0-9]")
_MAX_DISPLAY_NAME = 128


@dataclass(frozen=True, slots=True)
class Quota:
    """How much a project may ask for at the same time; 0 means no limit."""

    max_running_jobs: int = 0
    max_queued_jobs: int = 0


@dataclass(frozen=True, slots=True)
class Project:
    """A tenant. `version` rises with each change; the etag is made from it."""

    id: str
    display_name: str
    quota: Quota
    create_time: datetime
    version: int = 1


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `hint` is the secret's last four characters."""

    project: str
    id: str
    display_name: str
    role: str
    hint: str
    create_time: datetime
    revoke_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a presented secret proves."""

    project: str
    role: str
    key_id: str


def hash_secret(secret: str) -> str:
    """SHA-256 in hex. A secret has 285 bits of randomness, so a slow hash would protect nothing more."""
    return hashlib.sha256(secret.encode()).hexdigest()


def check_project_id(project_id: str) -> None:
    """Raise InvalidArgument unless it can be a project's id (see CreateProjectRequest.project_id)."""
    if not _PROJECT_ID.fullmatch(project_id):
        raise invalid(
            "project_id",
            f"project_id {project_id!r} must be 3 to 32 of a-z, 0-9 and '-', starting with a letter "
            "and ending with a letter or digit.",
        )


def check_display_name(display_name: str, field: str) -> None:
    """Raise InvalidArgument for a name too long to show."""
    if len(display_name) > _MAX_DISPLAY_NAME:
        raise invalid(field, f"{field} has {len(display_name)} characters; at most {_MAX_DISPLAY_NAME} fit.")


def check_role(role: str) -> None:
    """Raise InvalidArgument unless the role is viewer, member or admin."""
    if role not in ROLES:
        raise invalid("api_key.role", "api_key.role must be ROLE_VIEWER, ROLE_MEMBER or ROLE_ADMIN.")


def check_quota(quota: Quota) -> None:
    """Raise InvalidArgument for a negative limit."""
    for name in ("max_running_jobs", "max_queued_jobs"):
        if getattr(quota, name) < 0:
            raise invalid(f"project.quota.{name}", f"project.quota.{name} must be 0 (no limit) or more.")


def check_bootstrap_key(secret: str) -> None:
    """Raise InvalidArgument for a first key that could be guessed."""
    if not secret.startswith(SECRET_PREFIX) or len(secret) < len(SECRET_PREFIX) + 32:
        raise invalid(
            "bootstrap_key",
            f"The bootstrap key must begin with {SECRET_PREFIX!r} and have at least 32 random characters after it.",
        )


def invalid(field: str, message: str) -> InvalidArgument:
    """An InvalidArgument about one field."""
    return InvalidArgument(message, violations=[FieldViolation(field, message)])
