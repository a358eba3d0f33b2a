"""How a process calls the other services: its token, its certificate, the names it expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from lathe.common.rpc.channel import connect
from lathe.common.rpc.tls import ClientTls
from lathe.common.rpc.tokens import TokenFile
from lathe.common.settings import RpcSettings


@dataclass(frozen=True, slots=True)
class Dialer:
    """Opens channels to other services. token: asked at every call. tls: None for plaintext."""

    token: Callable[[], str] | None = None
    tls: ClientTls | None = None
    engine_name: str | None = None

    @classmethod
    def of_service(cls, settings: RpcSettings) -> Dialer:
        """A control service's. Raises FailedPrecondition if the token file cannot be read."""
        return cls._of(settings, settings.service_token_file)

    @classmethod
    def of_engine(cls, settings: RpcSettings) -> Dialer:
        """An engine's, which shows its own kind of token. Raises FailedPrecondition."""
        return cls._of(settings, settings.engine_token_file)

    @classmethod
    def _of(cls, settings: RpcSettings, token_file: Path | None) -> Dialer:
        token = TokenFile(token_file).shown if token_file is not None else None
        peers = settings.peers
        if peers is None:
            return cls(token)
        return cls(token, ClientTls(peers.ca_file, peers.cert_file, peers.key_file), peers.engine_name)

    def connect(self, target: str) -> grpc.aio.Channel:
        """A channel to a control service, which proves the host of `target`. The caller closes it.

        Raises FailedPrecondition if a certificate file is wrong.
        """
        return connect(target, self.token, self.tls)

    def connect_engine(self, target: str) -> grpc.aio.Channel:
        """A channel to an engine: engines have no host name of their own, all of them prove `engine_name`.

        The caller closes it. Raises FailedPrecondition if a certificate file is wrong.
        """
        tls = replace(self.tls, server_name=self.engine_name) if self.tls is not None else None
        return connect(target, self.token, tls)
