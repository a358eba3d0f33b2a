"""Looking at a platform as anybody on the network sees it: names, ports, TLS, HTTP, clocks. Standard library only."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from lathe.common.errors import InvalidArgument

DEFAULT_GRPC_PORT = 7460
DEFAULT_HTTP_PORT = 8080


@dataclass(frozen=True, slots=True)
class HttpInfo:
    """What `GET /v1/lathe/info` said. problem: why it said nothing; version is empty then."""

    host: str
    version: str = ""
    grpc_port: int = 0
    problem: str = ""


def split_address(address: str) -> tuple[str, int | None]:
    """`host:port`, `host` or `[v6]:port` as (host, port). Raises InvalidArgument."""
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
        # What no name server can be asked for: an empty label, or one of more than 63 characters.
        (host or "").encode("idna")
    except ValueError:
        host, port = None, None
    if not host or "/" in address or "@" in address:
        raise InvalidArgument(f"{address!r} is no address: give host:port, such as lathe.example.com:7460.")
    return (f"[{host}]" if ":" in host else host), port


def guessed_http(address: str, tls: bool) -> str:
    """Where the OpenAI door usually is, beside the gRPC door."""
    return f"{'https' if tls else 'http'}://{split_address(address)[0]}:{DEFAULT_HTTP_PORT}"


def fetch_info(url: str, ca_file: Path | None, timeout_s: float) -> HttpInfo:
    """Ask the OpenAI door who it is. Never raises for what the other side does, InvalidArgument for what is given."""
    host = urlsplit(url).hostname or ""
    host = f"[{host}]" if ":" in host else host
    if urlsplit(url).scheme not in ("http", "https") or not host:
        raise InvalidArgument(f"{url!r} is no http:// or https:// URL.")
    context = _trusting(ca_file)
    try:
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/lathe/info", headers={"Accept": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            content = json.loads(answer.read(65536))
        if content.get("object") != "lathe.info":
            return HttpInfo(host, problem="something else answers there")
        return HttpInfo(host, str(content["version"]), int(content["grpc_port"]))
    except urllib.error.HTTPError as error:
        return HttpInfo(host, problem=f"it answers with status {error.code}")
    except urllib.error.URLError as error:
        return HttpInfo(host, problem=str(getattr(error.reason, "strerror", None) or error.reason))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return HttpInfo(host, problem=str(error) or type(error).__name__)


def resolve(host: str) -> list[str]:
    """The addresses that a name has. Raises OSError."""
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


def connect(address: str, timeout_s: float) -> None:
    """Open and close a TCP connection. Raises OSError."""
    host, port = split_address(address)
    socket.create_connection((host.strip("[]"), port or DEFAULT_GRPC_PORT), timeout=timeout_s).close()


def speaks_tls(address: str, timeout_s: float) -> bool | None:
    """Whether the port answers a TLS handshake; None if it cannot be reached."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        _handshake(address, context, timeout_s)
    except ssl.SSLError:
        return False
    except TimeoutError:
        return False
    except OSError:
        return None
    return True


def certificate_expiry(address: str, ca_file: Path | None, timeout_s: float) -> datetime:
    """When the certificate that the platform shows ends.

    Raises OSError (ssl.SSLError for one that is not trusted), InvalidArgument for a wrong ca_file.
    """
    ends = _handshake(address, _trusting(ca_file), timeout_s)
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except OSError as error:
        why = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise InvalidArgument(f"The CA file {ca_file} cannot be used: {why}.") from error


def _handshake(address: str, context: ssl.SSLContext, timeout_s: float) -> str:
    context.set_alpn_protocols(["h2"])
    host, port = split_address(address)
    name = host.strip("[]")
    with (
        socket.create_connection((name, port or DEFAULT_GRPC_PORT), timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        certificate = secured.getpeercert() or {}
        return str(certificate.get("notAfter", ""))
