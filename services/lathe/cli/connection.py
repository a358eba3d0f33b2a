"""Which platform a command talks to: options, then LATHE_ADDRESS and LATHE_API_KEY, then a local `lathe up`."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lathe.common.errors import Unauthenticated, Unavailable

if TYPE_CHECKING:
    from lathe.client import Client


@dataclass(frozen=True, slots=True)
class Connection:
    """What was given before the command's name, or by the environment. None is looked up."""

    address: str | None = None
    api_key: str | None = None
    data: Path = Path(".lathe")
    tls: bool = False
    ca_file: Path | None = None
    timeout: float = 30.0

    def resolved(self) -> tuple[str, str]:
        """(address, key). Raises Unavailable or Unauthenticated, saying what to give.

        The key in the data folder is for the platform that runs on it: it is never sent to another address.
        """
        local = local_address(self.data)
        address = self.address or local
        if address is None:
            raise Unavailable(
                f"No platform runs on {self.data}. Start one with `lathe up`, or give --address and --api-key "
                "(LATHE_ADDRESS, LATHE_API_KEY)."
            )
        if self.api_key:
            return address, self.api_key
        if address != local:
            raise Unauthenticated(f"{address} needs a key: give --api-key or set LATHE_API_KEY.")
        try:
            return address, (self.data / "api_key").read_text().strip()
        except OSError as error:
            raise Unauthenticated(
                f"The key of the platform on {self.data} cannot be read ({error.strerror}): "
                "give --api-key or set LATHE_API_KEY."
            ) from error

    def client(self) -> Client:
        """A client of that platform. Raises what `resolved` raises."""
        from lathe.client import Client, Tls

        address, api_key = self.resolved()
        tls = Tls(self.ca_file) if self.tls or self.ca_file is not None else None
        return Client(address, api_key, tls=tls, timeout=self.timeout)


def local_address(data: Path) -> str | None:
    """Where a running `lathe up` on this folder answers gRPC; None when none runs."""
    try:
        address = str(json.loads((data / "endpoint.json").read_text())["grpc"])
        host, _, port = address.rpartition(":")
        # One that was killed has left its file behind.
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return address


def connection(context: typer.Context) -> Connection:
    """What the command line said before the command."""
    found = context.find_object(Connection)
    return found if found is not None else Connection()


def client_of(context: typer.Context) -> Client:
    """A client of the platform that the command line names."""
    return connection(context).client()
