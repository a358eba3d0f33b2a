"""Which platform a command talks to.

The first that says something decides: the command line (--address, --context, --data), the environment (LATHE_ADDRESS,
LATHE_CONTEXT, LATHE_DATA), the current context of `lathe login`, and at last the `lathe up` on ./.lathe. A key goes to
the platform that it was given for and to no other: see `Connection.target`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lathe.cli.contexts import LOCAL, Contexts, PlatformContext, contexts_file, read_contexts
from lathe.common.errors import InvalidArgument, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from lathe.client import Client

DEFAULT_DATA = Path(".lathe")
CHOICE = (
    "Which platform: what the command line says (--address, --context, --data), else the environment (LATHE_ADDRESS, "
    "LATHE_CONTEXT, LATHE_DATA), else the current context of `lathe login`, else the `lathe up` on ./.lathe."
)


@dataclass(frozen=True, slots=True)
class Environment:
    """What LATHE_ADDRESS, LATHE_API_KEY, LATHE_CONTEXT, LATHE_DATA, LATHE_TLS and LATHE_CA_FILE say."""

    address: str | None = None
    api_key: str | None = None
    context: str | None = None
    data: Path | None = None
    tls: bool = False
    ca_file: Path | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Environment:
        """Read from the variables themselves: what an option has replaced still says whose LATHE_API_KEY it is."""
        data, ca_file = environ.get("LATHE_DATA"), environ.get("LATHE_CA_FILE")
        return cls(
            address=environ.get("LATHE_ADDRESS") or None,
            api_key=environ.get("LATHE_API_KEY") or None,
            context=environ.get("LATHE_CONTEXT") or None,
            data=Path(data) if data else None,
            tls=environ.get("LATHE_TLS", "").lower() in ("1", "true", "t", "yes", "y", "on"),
            ca_file=Path(ca_file) if ca_file else None,
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A platform and how to reach it. http: its OpenAI door, if that is known. source: why this one, in words."""

    address: str
    api_key: str
    source: str
    tls: bool = False
    ca_file: Path | None = None
    http: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """(address, key)"""
        return self.address, self.api_key


@dataclass(frozen=True, slots=True)
class Connection:
    """What was given before the command's name, and by the environment. contexts: reads those of `lathe login`."""

    address: str | None = None
    api_key: str | None = None
    data: Path | None = None
    tls: bool = False
    ca_file: Path | None = None
    timeout: float = 30.0
    context: str | None = None
    environment: Environment = Environment()
    contexts: Callable[[], Contexts] = Contexts

    @property
    def data_folder(self) -> Path:
        """The folder of a local platform, whether or not one runs there; caches are kept in it too."""
        return self.data or self.environment.data or DEFAULT_DATA

    def target(self) -> Target:
        """The platform, and its key.

        A key from the command line goes where the command line points. LATHE_API_KEY belongs to LATHE_ADDRESS, or
        without that to --address or the local platform; it never takes the place of a context's key. A context's key
        and the one in a data folder go to their own addresses only. Raises Unavailable, Unauthenticated, NotFound or
        InvalidArgument, saying what to give.
        """
        environment = self.environment
        if self.address and self.context:
            raise InvalidArgument("Give --address or --context, not both.")
        if self.address:
            return self._at(self.address, "--address")
        if self.context:
            return self._named(self.context, "--context")
        if self.data is not None:
            return self._local()
        if environment.address:
            return self._at(environment.address, "LATHE_ADDRESS")
        if environment.context:
            return self._named(environment.context, "LATHE_CONTEXT")
        current = self.contexts().current if environment.data is None else ""
        return self._named(current, "the current context") if current else self._local()

    def client(self) -> Client:
        """A client of that platform. Raises what `target` raises."""
        return client_for(self.target(), self.timeout)

    def _at(self, address: str, source: str) -> Target:
        environment = self.environment_of(address)
        known = self.contexts().at(address) or PlatformContext(address, "")
        key = self.api_key or environment.api_key or known.api_key
        http = known.http
        local = None if key and http else read_local(self.data_folder)
        if local is not None and local.address == address:
            key, http = key or _local_key(self.data_folder), local.http
        if not key:
            withheld = self.environment.api_key and not environment.api_key
            hint = "; LATHE_API_KEY is for LATHE_ADDRESS and is not sent elsewhere" if withheld else ""
            raise Unauthenticated(
                f"{address} needs a key: give --api-key, set LATHE_API_KEY, or log in once with "
                f"`lathe login {address}`{hint}."
            )
        ca_file = self.ca_file or environment.ca_file or (Path(known.ca_file) if known.ca_file else None)
        tls = self.tls or environment.tls or known.tls or ca_file is not None
        return Target(address, key, source, tls, ca_file, http)

    def _named(self, name: str, source: str) -> Target:
        if name == LOCAL:
            return self._local()
        known = self.contexts().get(name)
        ca_file = self.ca_file or (Path(known.ca_file) if known.ca_file else None)
        tls = known.tls or self.tls or ca_file is not None
        key = self.api_key or known.api_key
        return Target(known.address, key, f"{source} {name!r}", tls, ca_file, known.http)

    def _local(self) -> Target:
        folder = self.data_folder
        local = read_local(folder)
        if local is None:
            raise Unavailable(
                f"No platform runs on {folder}. Start one with `lathe up`, log in to another with `lathe login`, "
                "or give --address and --api-key (LATHE_ADDRESS, LATHE_API_KEY)."
            )
        environment = self.environment_of(local.address)
        key = self.api_key or environment.api_key or _local_key(folder)
        ca_file = self.ca_file or environment.ca_file
        tls = self.tls or environment.tls or ca_file is not None
        return Target(local.address, key, f"the platform on {folder}", tls, ca_file, local.http)

    def environment_of(self, address: str) -> Environment:
        """What the environment says for this address: nothing, if LATHE_ADDRESS names another."""
        return self.environment if self.environment.address in (None, address) else Environment()


@dataclass(frozen=True, slots=True)
class LocalPlatform:
    """Where a running `lathe up` answers."""

    address: str
    http: str


def read_local(data: Path) -> LocalPlatform | None:
    """The `lathe up` that runs on this folder; None when none runs."""
    try:
        endpoint = json.loads((data / "endpoint.json").read_text())
        address = str(endpoint["grpc"])
        host, _, port = address.rpartition(":")
        # One that was killed has left its file behind.
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return LocalPlatform(address, str(endpoint.get("http", "")))


def _local_key(data: Path) -> str:
    try:
        return (data / "api_key").read_text().strip()
    except OSError as error:
        raise Unauthenticated(
            f"The key of the platform on {data} cannot be read ({error.strerror}): "
            "give --api-key or set LATHE_API_KEY."
        ) from error


def client_for(target: Target, timeout: float) -> Client:
    """A client of a platform that was chosen."""
    # What goes wrong is in the errors; gRPC's own log lines would stand between a command's lines.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lathe.client import Client, Tls

    tls = Tls(target.ca_file) if target.tls else None
    return Client(target.address, target.api_key, tls=tls, timeout=timeout)


def stored_contexts() -> Contexts:
    """What `lathe login` has stored for this user."""
    return read_contexts(contexts_file(os.environ))


def connection(context: typer.Context) -> Connection:
    """What the command line said before the command."""
    found = context.find_object(Connection)
    return found if found is not None else Connection()


def client_of(context: typer.Context) -> Client:
    """A client of the platform that the command line names."""
    return connection(context).client()
