"""Who the client is: an API key becomes a principal, at the gRPC door and at the HTTP door alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from lathe.common.clock import Clock
from lathe.common.errors import PermissionDenied, Unauthenticated
from lathe.common.rpc.auth import AUTHORIZATION_KEY, Metadata
from lathe.common.rpc.principal import Caller, Principal, Role
from lathe.gateway.ports import KeyService

API_KEY = "api-key"
_MAX_CACHED = 10_000


@dataclass(frozen=True, slots=True)
class _Known:
    """What accounts said about a key, and until when it is believed (monotonic seconds)."""

    principal: Principal | None
    until: float


class Authenticator:
    """Asks accounts about keys, and believes each answer, good or bad, for `cache_s` seconds.

    That is the bound on how long a revoked key goes on working. Keys are held as their SHA-256 only.
    """

    def __init__(
        self, keys: KeyService, clock: Clock, cache_s: float = 5.0, max_cached: int = _MAX_CACHED
    ) -> None:
        self._keys = keys
        self._clock = clock
        self._cache_s = cache_s
        self._max_cached = max_cached
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def authenticate(self, authorization: str | None, api_key: str | None) -> Principal:
        """The principal of `authorization: Bearer <key>` or `api-key: <key>`, given as sent.

        Raises Unauthenticated, alike for a wrong and a revoked key, and Unavailable while accounts is away.
        """
        secret = presented_key(authorization, api_key)
        digest = hashlib.sha256(secret.encode()).digest()
        known = self._known.get(digest)
        if known is None or known.until <= self._clock.monotonic():
            known = await self._ask(digest, secret)
        if known.principal is None:
            raise _wrong_key()
        return known.principal

    async def _ask(self, digest: bytes, secret: str) -> _Known:
        # The time is taken before the call: a revocation during it must not be believed away for longer.
        until = self._clock.monotonic() + self._cache_s
        principal: Principal | None
        try:
            principal = await self._keys.authenticate(secret)
        except Unauthenticated:
            principal = None
        known = _Known(principal, until)
        self._known[digest] = known
        self._known.move_to_end(digest)
        while len(self._known) > self._max_cached:
            self._known.popitem(last=False)
        return known


def presented_key(authorization: str | None, api_key: str | None) -> str:
    """The secret that a client showed. Raises Unauthenticated if it showed none."""
    if authorization is not None:
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() == "bearer" and secret.strip():
            return secret.strip()
    if api_key is not None and api_key.strip():
        return api_key.strip()
    raise Unauthenticated(
        "No API key was given; send it as 'authorization: Bearer <key>' or 'api-key: <key>'.",
        reason="MISSING_API_KEY",
    )


def _wrong_key() -> Unauthenticated:
    return Unauthenticated(
        "The API key is not valid; check it, or create another one.", reason="INVALID_API_KEY"
    )


def demand_role(principal: Principal, minimum: Role) -> None:
    """Raises PermissionDenied if the principal's role is below `minimum` (viewer < member < admin)."""
    if Role[principal.role.upper()] < minimum:
        needed = minimum.name.lower()
        raise PermissionDenied(
            f"This needs the role {needed}; the key's role is {principal.role}. "
            f"Use a key with a higher role.",
            reason="ROLE_TOO_LOW",
            metadata={"required_role": needed, "role": principal.role},
        )


class MetadataAuthenticator:
    """The gRPC door's: the same keys in a call's metadata, for the server's authentication interceptor."""

    def __init__(self, keys: Authenticator) -> None:
        self._keys = keys

    async def authenticate(self, service: str, method: str, metadata: Metadata) -> Caller:
        """A user's call never carries a service credential, so `service` of the caller is None."""
        principal = await self._keys.authenticate(
            _single(metadata, AUTHORIZATION_KEY), _single(metadata, API_KEY)
        )
        return Caller(principal=principal)


def _single(metadata: Metadata, key: str) -> str | None:
    values = [value for name, value in metadata if name == key]
    if len(values) > 1:
        raise Unauthenticated(f"A call may carry one {key} only.", reason="TWO_KEYS")
    if not values:
        return None
    return values[0] if isinstance(values[0], str) else values[0].decode("latin-1")
