"""Which service is calling, and for whom: tokens, principals and what each may call."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lathe.common.errors import PermissionDenied, Unauthenticated
from lathe.common.rpc.principal import PRINCIPAL_KEY, Caller, decode_principal
from lathe.common.rpc.tokens import TokenFile

AUTHORIZATION_KEY = "authorization"
SERVICE = "lathe"
ENGINE = "engine"
WORKER_SERVICE = "lathe.v1.WorkerService"
_INTERNAL_SUFFIXES = ("InternalService", "WorkerService", "EngineService")

Metadata = Sequence[tuple[str, str | bytes]]


def is_internal(service_full_name: str) -> bool:
    """Whether only services and engines may call it: its name ends in Internal-, Worker- or EngineService."""
    return service_full_name.endswith(_INTERNAL_SUFFIXES)


class Authenticator(Protocol):
    """Turns the metadata of a call into its Caller. The gateway has its own, which knows API keys."""

    async def authenticate(self, service: str, method: str, metadata: Metadata) -> Caller:
        """The caller; `service` is a full name such as `lathe.v1.JobsService`.

        Raises Unauthenticated or PermissionDenied.
        """
        ...


@dataclass(frozen=True, slots=True)
class ServiceCredentials:
    """The tokens that a server accepts: credential name (`lathe`, `engine`) -> a function that gives them."""

    tokens: Mapping[str, Callable[[], Sequence[str]]]

    @classmethod
    def from_tokens(cls, tokens: Mapping[str, str]) -> ServiceCredentials:
        """tokens: credential name -> token."""

        def always(token: str) -> Callable[[], Sequence[str]]:
            return lambda: (token,)

        return cls({name: always(token) for name, token in tokens.items()})

    @classmethod
    def from_files(
        cls, service_token_file: Path | None, engine_token_file: Path | None
    ) -> ServiceCredentials:
        """Follow the token files that the settings name. Raises FailedPrecondition if one cannot be read."""
        files = {SERVICE: service_token_file, ENGINE: engine_token_file}
        return cls({name: TokenFile(path).accepted for name, path in files.items() if path is not None})

    def identify(self, token: str) -> str | None:
        """The credential's name, None for an unknown token. Takes the same time for every token."""
        digest = _hash(token)
        found: str | None = None
        for name, accepted in self.tokens.items():
            for known in accepted():
                if hmac.compare_digest(digest, _hash(known)):
                    found = name
        return found


@dataclass(frozen=True, slots=True)
class ServiceAuthenticator:
    """Accepts services and engines by their token, and users only through a service."""

    credentials: ServiceCredentials

    async def authenticate(self, service: str, method: str, metadata: Metadata) -> Caller:
        return decide_caller(self.credentials, service, metadata)


def decide_caller(credentials: ServiceCredentials, service: str, metadata: Metadata) -> Caller:
    """Who calls a method of `service`.

    A service credential with a principal may call everything, without one internal services only; an engine's
    credential WorkerService only and never with a principal. Raises Unauthenticated or PermissionDenied.
    """
    tokens = _texts(metadata, AUTHORIZATION_KEY)
    principals = _texts(metadata, PRINCIPAL_KEY)
    scheme, _, token = tokens[0].partition(" ") if len(tokens) == 1 else ("", "", "")
    name = credentials.identify(token.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise Unauthenticated("This service accepts calls from Lathe's own services only; call the gateway.")
    if len(principals) > 1:
        raise Unauthenticated(f"A call may carry one {PRINCIPAL_KEY} only.", reason="TWO_PRINCIPALS")
    if name == ENGINE:
        if principals:
            raise Unauthenticated("An engine acts for itself only and may not carry a principal.")
        if service != WORKER_SERVICE:
            raise PermissionDenied(f"An engine may call {WORKER_SERVICE} only.", reason="ENGINE_CREDENTIAL")
        return Caller(service=name)
    if principals:
        return Caller(service=name, principal=decode_principal(principals[0]))
    if not is_internal(service):
        raise PermissionDenied(
            f"{service} acts for users; the call must carry {PRINCIPAL_KEY}.", reason="PRINCIPAL_REQUIRED"
        )
    return Caller(service=name)


def _texts(metadata: Metadata, key: str) -> list[str]:
    return [value if isinstance(value, str) else value.decode("latin-1") for k, value in metadata if k == key]


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
