"""Identifiers of resources."""

from __future__ import annotations

import secrets
from typing import Protocol

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LENGTH = 24

# OpenAI's own ids join some prefixes with an underscore, and clients compare the beginnings.
_UNDERSCORE_PREFIXES = frozenset({"ftckpt", "key", "batch", "upload"})


def format_id(prefix: str, body: str) -> str:
    """`ftjob` + body -> `ftjob-<body>`; `ftckpt` and `key` are joined by an underscore."""
    joint = "_" if prefix in _UNDERSCORE_PREFIXES else "-"
    return f"{prefix}{joint}{body}"


class IdFactory(Protocol):
    """Where a service gets new ids and secrets from."""

    def new(self, prefix: str) -> str:
        """A new id, for instance `ftjob-` and 24 base62 characters."""
        ...

    def token(self, length: int = 48) -> str:
        """A new secret of `length` base62 characters (about 6 bits each)."""
        ...


class RandomIds:
    """Ids from the operating system's randomness: 24 base62 characters are 142 bits."""

    def new(self, prefix: str) -> str:
        return format_id(prefix, self.token(LENGTH))

    def token(self, length: int = 48) -> str:
        return "".join(secrets.choice(ALPHABET) for _ in range(length))
