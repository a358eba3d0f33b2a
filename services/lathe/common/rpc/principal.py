"""Who is calling, and what that caller may do."""

from __future__ import annotations

import json
from contextvars import ContextVar, Token
from dataclasses import asdict, dataclass
from enum import IntEnum
from urllib.parse import parse_qsl

from lathe.common.errors import NotFound, PermissionDenied, Unauthenticated
from lathe.common.names import project_of

PRINCIPAL_KEY = "lathe-principal"
# The project that accounts makes at its first start; its admins run the platform.
DEFAULT_PROJECT = "default"


class Role(IntEnum):
    """Roles inside a project; a higher one may do all that a lower one may."""

    VIEWER = 1
    MEMBER = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """The user on whose behalf a service calls: a project, a role in it, and the API key that proved it."""

    project: str
    role: str
    key_id: str

    def encode(self) -> str:
        """The value of the `lathe-principal` metadata."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Caller:
    """service: the name of the calling service (`lathe` or `engine`), None for a call without credential.

    principal: the user it acts for, None when it acts for itself.
    """

    service: str | None = None
    principal: Principal | None = None


# One value per call; set by the authentication interceptor alone.
_CALLER: ContextVar[Caller] = ContextVar("lathe_caller")


def decode_principal(value: str) -> Principal:
    """Read `lathe-principal`: JSON, or url-encoded with ampersands or commas (`project=..,role=..,key=..`).

    Raises Unauthenticated if it is not exactly a project, a role and a key.
    """
    try:
        if value.startswith("{"):
            fields = json.loads(value)
        else:
            fields = dict(parse_qsl(value.replace(",", "&"), strict_parsing=True))
    except ValueError as error:
        raise _bad_principal() from error
    if "key" in fields:
        fields["key_id"] = fields.pop("key")
    if set(fields) != {"project", "role", "key_id"} or not all(isinstance(v, str) for v in fields.values()):
        raise _bad_principal()
    if fields["role"].upper() not in Role.__members__ or not fields["project"]:
        raise _bad_principal()
    return Principal(fields["project"], fields["role"].lower(), fields["key_id"])


def _bad_principal() -> Unauthenticated:
    return Unauthenticated(
        f"{PRINCIPAL_KEY} must hold a project, a role (viewer, member or admin) and a key.",
        reason="INVALID_PRINCIPAL",
    )


def set_caller(caller: Caller) -> Token[Caller]:
    """Make `caller` the current one; for the interceptor, for tests and for calls inside one process."""
    return _CALLER.set(caller)


def reset_caller(token: Token[Caller]) -> None:
    """Undo `set_caller`."""
    _CALLER.reset(token)


def current_caller() -> Caller:
    """The caller of the running call. Raises Unauthenticated outside a call."""
    caller = _CALLER.get(None)
    if caller is None:
        raise Unauthenticated("This can be done only within an authenticated call.")
    return caller


def require_project(name: str, *, field: str = "name") -> str:
    """The project id in a resource name, if the caller may see it.

    A service that acts for itself may see every project. Raises NotFound for another project's name, whether
    or not the resource exists, and InvalidArgument for a name without a project.
    """
    project = project_of(name, field=field)
    principal = current_caller().principal
    if principal is not None and principal.project != project:
        raise NotFound(f"{name} was not found.")
    return project


def require_role(minimum: Role | str) -> None:
    """Raise PermissionDenied if the user's role is below `minimum` (viewer < member < admin).

    A service that acts for itself has every role.
    """
    needed = minimum if isinstance(minimum, Role) else Role[minimum.upper()]
    principal = current_caller().principal
    if principal is not None and Role[principal.role.upper()] < needed:
        raise PermissionDenied(
            f"This needs the role {needed.name.lower()}; the key's role is {principal.role}. "
            f"Use a key with a higher role.",
            reason="ROLE_TOO_LOW",
            metadata={"required_role": needed.name.lower(), "role": principal.role},
        )


def is_operator(principal: Principal | None) -> bool:
    """Whether a caller may change what all projects share: an admin of the default project, or a service that acts
    for itself (None)."""
    return principal is None or (
        principal.project == DEFAULT_PROJECT and principal.role == Role.ADMIN.name.lower()
    )


def require_operator(principal: Principal | None, what: str) -> None:
    """Raise PermissionDenied unless `is_operator`. what: an infinitive such as `change base models`."""
    if not is_operator(principal):
        raise PermissionDenied(
            f"Only an admin of the project {DEFAULT_PROJECT} may {what}.", reason="OPERATOR_REQUIRED"
        )
