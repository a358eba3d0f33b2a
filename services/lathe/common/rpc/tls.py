"""Certificates of both sides of a connection, read again when their files change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from lathe.common.clock import Clock
from lathe.common.errors import FailedPrecondition
from lathe.common.follow import Followed
from lathe.common.settings import RpcSettings


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How to prove a server, and oneself to it.

    ca_file: PEM authorities; None for the system's. server_name: expected instead of the target's host.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Pem:
    """The contents of the three files."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def follow_pem(
    ca_file: Path | None, cert_file: Path | None, key_file: Path | None, clock: Clock | None = None
) -> Followed[Pem]:
    """The files, as long as they fit together. Raises FailedPrecondition naming the file that is wrong."""
    paths = [path for path in (ca_file, cert_file, key_file) if path is not None]
    return Followed(paths, lambda: read_pem(ca_file, cert_file, key_file), clock)


def read_pem(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> Pem:
    """Read and check. Raises FailedPrecondition naming the file that is wrong."""
    ca, cert, key = _bytes(ca_file), _bytes(cert_file), _bytes(key_file)
    if ca_file is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
        except (ssl.SSLError, OSError) as error:
            raise FailedPrecondition(
                f"The TLS file {ca_file} holds no PEM certificate of an authority."
            ) from error
    if cert_file is not None and key_file is not None:
        server_context(cert_file, key_file)
    return Pem(ca, cert, key)


def server_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """Of a server that asks for no certificate. Raises FailedPrecondition if the two do not belong together."""
    _bytes(cert_file)
    _bytes(key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password function an encrypted key would be asked for on the terminal.
        context.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        raise FailedPrecondition(
            f"The TLS files {cert_file} and {key_file} are not a PEM certificate and its unencrypted key."
        ) from error
    return context


def server_credentials(settings: RpcSettings, clock: Clock | None = None) -> grpc.ServerCredentials | None:
    """What a server shows, and asks for when there is a client CA; None without TLS.

    Each new connection gets the files as they are then. Raises FailedPrecondition naming the file that is wrong.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    files = follow_pem(settings.tls_client_ca_file, settings.tls_cert_file, settings.tls_key_file, clock)
    given = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        pem = files.current()
        if pem is given:
            return None
        given = pem
        return _configuration(pem)

    ask = settings.tls_client_ca_file is not None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(given),
        changed,  # type: ignore[arg-type]  # None is for no change, which the stubs do not know
        require_client_authentication=ask,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None and pem.cert is not None  # the settings demand both
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], root_certificates=pem.ca)


def _bytes(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"The TLS file {path} cannot be read: {error.strerror}.") from error
