"""Reading from URLs that a user names, without being turned on the network inside.

The name is resolved once, every address it has is checked, and the connection goes to one of these addresses: what the
name means a moment later plays no part. Each redirect is a new URL and is checked like the first. No proxy is used, no
credential sent, nothing decoded.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from lathe.datasets.addresses import Network, may_reach

MAX_REDIRECTS = 5
MAX_URL = 4096
_CHUNK = 1 << 20
_CONNECT_S = 10.0
_SILENCE_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PORTS = {"http": 80, "https": 443}

T = TypeVar("T")
# host, port -> addresses
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]


class FetchRefused(Exception):
    """It will not be fetched, however often it is asked for. code: a kind of finding."""

    def __init__(self, message: str, code: str = "import_refused") -> None:
        super().__init__(message)
        self.code = code


class FetchBroke(Exception):
    """It may work another time."""


async def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


@dataclass(frozen=True, slots=True)
class Fetcher:
    """allowed: networks that are reached although they are not global. max_bytes, max_seconds: of one fetch."""

    allowed: tuple[Network, ...]
    max_bytes: int
    max_seconds: float
    resolve: Resolver = resolved
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    async def fetch(self, url: str) -> AsyncIterator[bytes]:
        """The bytes behind a URL, redirects followed. Raises FetchRefused, FetchBroke."""
        # No asyncio.timeout: whoever asks for the next chunk may be another task each time.
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        connection, answer = await self._answer(url, deadline)
        try:
            async for chunk in self._body(answer, deadline):
                yield chunk
        finally:
            _abort(connection)

    async def _answer(self, url: str, deadline: float) -> tuple[HTTPConnection, HTTPResponse]:
        for _ in range(MAX_REDIRECTS + 1):
            target = checked(url)
            connection = await self._connected(target, deadline)
            try:
                answer = await _aside(partial(_asked, connection, target), deadline)
                if answer.status not in _REDIRECTS:
                    return connection, _good(answer)
                url = _redirected(target, answer.getheader("location") or "")
            except BaseException:
                _abort(connection)
                raise
            _abort(connection)
        raise FetchRefused(f"It redirects more than {MAX_REDIRECTS} times.")

    async def _connected(self, target: SplitResult, deadline: float) -> HTTPConnection:
        host, port = target.hostname or "", target.port or _PORTS[target.scheme]
        try:
            addresses = await self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchBroke(f"{host} cannot be resolved.") from error
        refused = [address for address in addresses if not may_reach(address, self.allowed)]
        if refused:
            raise FetchRefused(
                f"{host} is at an address that imports may not reach. Only public addresses are, and networks "
                "that the operator allows."
            )
        why: FetchBroke | None = None
        for address in addresses:
            connection = _Pinned(address, host, port, self.tls if target.scheme == "https" else None)
            try:
                await _aside(connection.connect, deadline)
            except FetchBroke as error:
                why = error
                continue
            return connection
        raise why or FetchBroke(f"{host} has no address.")

    async def _body(self, answer: HTTPResponse, deadline: float) -> AsyncIterator[bytes]:
        announced, size = answer.length, 0
        if announced is not None and announced > self.max_bytes:
            raise self._too_large()
        while chunk := await _aside(partial(answer.read1, _CHUNK), deadline):
            size += len(chunk)
            if size > self.max_bytes:
                raise self._too_large()
            yield chunk
        if announced is not None and size != announced:
            raise FetchBroke(f"The connection broke after {size} of {announced} bytes.")

    def _too_large(self) -> FetchRefused:
        return FetchRefused(f"It is larger than {self.max_bytes} bytes.", "import_too_large")


class _Pinned(HTTPConnection):
    """Connects to one address, and asks it for a host."""

    def __init__(self, address: str, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=_CONNECT_S)
        self._address = address
        self._tls = tls
        # http.client writes the port into the Host header unless it is the scheme's own.
        self.default_port = _PORTS["https" if tls else "http"]

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), _CONNECT_S)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)
        self.sock.settimeout(_SILENCE_S)


def checked(url: str) -> SplitResult:
    """The parts of a URL that may be fetched. Raises FetchRefused."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchRefused("It is no URL.") from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise FetchRefused("It must begin with https:// or http:// and name a host.")
    if parts.username is not None or parts.password is not None:
        raise FetchRefused("It may carry no user name and password; use a URL that is signed.")
    if port == 0 or len(url) > MAX_URL or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise FetchRefused(f"It must be at most {MAX_URL} printable ASCII characters, percent-encoded.")
    return parts


def shown(url: str) -> str:
    """Without the query, which may hold a signature."""
    return url.partition("?")[0].partition("#")[0]


def _asked(connection: HTTPConnection, target: SplitResult) -> HTTPResponse:
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    headers = {"Accept-Encoding": "identity", "User-Agent": "lathe-import", "Connection": "close"}
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def _good(answer: HTTPResponse) -> HTTPResponse:
    if answer.status in (408, 425, 429) or answer.status >= 500:
        raise FetchBroke(f"The server answered {answer.status}.")
    if answer.status != 200:
        raise FetchRefused(f"The server answered {answer.status}.", "import_failed")
    coding = (answer.getheader("content-encoding") or "identity").lower()
    if coding != "identity":
        raise FetchRefused(
            f"The server sends it encoded as {coding[:40]}, although it was asked not to.", "import_failed"
        )
    return answer


def _redirected(source: SplitResult, location: str) -> str:
    target = urljoin(source.geturl(), location)
    if source.scheme == "https" and urlsplit(target).scheme == "http":
        raise FetchRefused("It redirects from https to http.")
    return target


def _abort(connection: HTTPConnection) -> None:
    """A thread that still waits for the other side gets an error."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


async def _aside(work: Callable[[], T], deadline: float) -> T:
    """In a thread, until the loop's time is `deadline`."""
    loop = asyncio.get_running_loop()
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), max(0.0, deadline - loop.time()))
    except TimeoutError as error:
        if loop.time() >= deadline:
            raise FetchRefused("It took longer than an import may take.", "import_too_large") from error
        raise FetchBroke("The server was silent for too long.") from error
    except ssl.SSLCertVerificationError as error:
        raise FetchRefused(f"The server's certificate is not trusted: {error.verify_message}.") from error
    except (HTTPException, ValueError) as error:
        raise FetchBroke(f"The server's answer cannot be read ({type(error).__name__}).") from error
    except OSError as error:
        raise FetchBroke(f"The connection broke ({error.strerror or type(error).__name__}).") from error
