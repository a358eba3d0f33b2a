"""The platforms that `lathe login` remembers: a file like kubectl's, for its owner's eyes only."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lathe.common.errors import FailedPrecondition, InvalidArgument, NotFound

# The `lathe up` on this machine: it needs no login, and its name is taken.
LOCAL = "local"
FILE_VARIABLE = "LATHE_CONTEXTS_FILE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class PlatformContext:
    """How to reach a platform, and the key for it. http: where its OpenAI door is, empty if that is not known.

    ca_file: an absolute path, empty for the system's authorities.
    """

    address: str
    api_key: str
    tls: bool = False
    ca_file: str = ""
    http: str = ""


@dataclass(frozen=True, slots=True)
class Contexts:
    """current: a name in `known`, or empty for the local platform."""

    current: str = ""
    known: Mapping[str, PlatformContext] = field(default_factory=dict)

    def get(self, name: str) -> PlatformContext:
        """Raises NotFound naming those that there are."""
        if name not in self.known:
            names = ", ".join((LOCAL, *sorted(self.known)))
            raise NotFound(
                f"There is no context {name!r}; known: {names}. `lathe login ADDRESS` makes another."
            )
        return self.known[name]

    def using(self, name: str) -> Contexts:
        """With another current one. Raises NotFound."""
        if name == LOCAL:
            return replace(self, current="")
        self.get(name)
        return replace(self, current=name)

    def with_context(self, name: str, context: PlatformContext) -> Contexts:
        """With `context` as the current one. Raises InvalidArgument for a name that cannot be one."""
        if name == LOCAL or not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot be a context's name: give another with --name, 1 to 63 of letters, digits and ._-, "
                f"not {LOCAL!r}."
            )
        return Contexts(name, {**self.known, name: context})

    def without(self, name: str) -> Contexts:
        """Raises NotFound."""
        self.get(name)
        rest = {key: value for key, value in self.known.items() if key != name}
        return Contexts("" if self.current == name else self.current, rest)

    def at(self, address: str) -> PlatformContext | None:
        """The context of a platform by its address; the current one first."""
        names = [self.current, *sorted(self.known)]
        found = (self.known[name] for name in names if name in self.known)
        return next((context for context in found if context.address == address), None)


def contexts_file(environ: Mapping[str, str] = os.environ) -> Path:
    """LATHE_CONTEXTS_FILE, or lathe/config.yaml below XDG_CONFIG_HOME or ~/.config."""
    given = environ.get(FILE_VARIABLE)
    if given:
        return Path(given).expanduser()
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "lathe" / "config.yaml"


def read_contexts(path: Path) -> Contexts:
    """What the file holds; nothing if there is none. Raises InvalidArgument for one that is not of our making."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Contexts()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"The contexts in {path} cannot be read: {error}.") from error
    # Only those who have logged in need it.
    import yaml

    try:
        return _contexts(yaml.safe_load(text) or {})
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgument(
            f"{path} does not hold contexts of lathe; correct it, or move it away and log in again."
        ) from error


def _contexts(content: dict[str, Any]) -> Contexts:
    names = {one.name for one in fields(PlatformContext)}
    known = {}
    for name, entry in content.get("contexts", {}).items():
        if set(entry) - names:
            raise ValueError(f"unknown fields in {name}")
        known[str(name)] = PlatformContext(**entry)
    current = str(content.get("current") or "")
    return Contexts(current if current in known else "", known)


def write_contexts(path: Path, contexts: Contexts) -> None:
    """Write the file whole or not at all, readable for its owner only. Raises FailedPrecondition."""
    import yaml

    content = {
        "current": contexts.current,
        "contexts": {
            name: {key: value for key, value in asdict(context).items() if value}
            for name, context in sorted(contexts.known.items())
        },
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(yaml.safe_dump(content, sort_keys=False))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be written: {error.strerror}.") from error
