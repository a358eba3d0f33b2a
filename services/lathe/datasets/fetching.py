"""Reading from URLs that a user names, without being turned on the network inside.

The name is resolved once a connection, every address it has is checked, and the connection goes to one of these
addresses: what the name means a moment later plays no part. Each redirect is a new URL and is checked like the first,
and so is each connection that goes on where another broke. No proxy is used, no credential sent but a `Secret` to its
own host, nothing decoded.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from lathe.datasets.addresses import Network, may_reach
from lathe.datasets.pinned import PORTS, PinnedConnection

MAX_REDIRECTS = 5
MAX_URL = 4096
MAX_STUCK = 5
"""So many connections in a row may break with less than PROGRESS_BYTES of the body."""
PROGRESS_BYTES = 1 << 20
SLOWEST_BYTES = 1 << 18
"""What has to come in each PACE_S: a server that sends a byte now and then would hold a place for long."""
PACE_S = 60.0
_CHUNK = 1 << 20
_RESOLVE_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", re.ASCII)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')

T = TypeVar("T")
# host, port -> addresses
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
Pause = Callable[[float], Awaitable[None]]


class FetchRefused(Exception):
    """It will not be fetched, however often it is asked for. code: a kind of finding."""

    def __init__(self, message: str, code: str = "import_refused") -> None:
        super().__init__(message)
        self.code = code


class FetchBroke(Exception):
    """It may work another time."""


@dataclass(frozen=True, slots=True)
class Secret:
    """What one host alone is told of who asks: the value of an Authorization header, and the host's URL. A redirect to
    another host, port or scheme does not carry it."""

    url: str
    authorization: str = field(repr=False)

    def headers(self, target: SplitResult) -> Mapping[str, str]:
        """Of a request for `target`."""
        return {"Authorization": self.authorization} if _origin(target) == _origin(urlsplit(self.url)) else {}


class _Changed(FetchBroke):
    """What is there now is not what was begun: another time it has to begin again."""


async def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, by the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def _own_threads() -> Executor:
    # Not the loop's: servers that are slow on purpose would take them all.
    return ThreadPoolExecutor(64, thread_name_prefix="import")


@dataclass(frozen=True, slots=True)
class _File:
    """What the answers say of the file. etag: a strong one; empty if a part of it cannot be asked for."""

    etag: str
    size: int | None


@dataclass(slots=True)
class _Pace:
    """Of one answer's body, in the time that is spent on waiting for it alone."""

    seconds: float = 0.0
    size: int = 0

    def took(self, size: int, seconds: float) -> None:
        """So many bytes more came. Raises FetchBroke if they come too slowly."""
        self.seconds += seconds
        self.size += size
        if self.seconds < PACE_S:
            return
        if self.size < SLOWEST_BYTES:
            raise FetchBroke(
                f"The server is too slow: it sent {self.size} bytes in {self.seconds:.0f} seconds; "
                f"{SLOWEST_BYTES} are the least."
            )
        self.seconds, self.size = 0.0, 0


@dataclass(frozen=True, slots=True)
class Fetcher:
    """allowed: networks that are reached although they are not global. max_bytes, max_seconds: of one fetch. pause:
    before a connection that goes on where another broke, in seconds."""

    allowed: tuple[Network, ...]
    max_bytes: int
    max_seconds: float
    resolve: Resolver = resolved
    pause: Pause = asyncio.sleep
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    threads: Executor = field(default_factory=_own_threads)

    async def fetch(self, url: str, secret: Secret | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes behind a URL, redirects followed; goes on where a connection broke, as long as the server offers
        that and there is progress. Raises FetchRefused, FetchBroke."""
        # No asyncio.timeout: whoever asks for the next chunk may be another task each time.
        deadline = asyncio.get_running_loop().time() + self.max_seconds
        file: _File | None = None
        size = stuck = 0
        while True:
            begin = size
            try:
                connection, answer = await self._answer(url, deadline, _wanted(file, begin), secret)
                try:
                    file = _file(answer) if file is None else _same(file, answer, begin)
                    async for chunk in self._body(connection, begin, file.size, deadline):
                        size += len(chunk)
                        yield chunk
                    return
                finally:
                    connection.abort()
            except FetchBroke as error:
                stuck = 0 if size - begin >= PROGRESS_BYTES else stuck + 1
                if (
                    file is None
                    or not file.etag
                    or size == 0
                    or stuck > MAX_STUCK
                    or isinstance(error, _Changed)
                ):
                    raise
            await self.pause(min(2.0**stuck, deadline - asyncio.get_running_loop().time()))

    async def _answer(
        self, url: str, deadline: float, wanted: Mapping[str, str], secret: Secret | None
    ) -> tuple[PinnedConnection, HTTPResponse]:
        for _ in range(MAX_REDIRECTS + 1):
            target = checked(url)
            headers = {**wanted, **(secret.headers(target) if secret is not None else {})}
            connection = await self._connected(target, deadline)
            try:
                answer = await self._aside(partial(connection.ask, headers), deadline, PACE_S)
                if answer.status not in _REDIRECTS:
                    return connection, _good(answer, part=bool(wanted))
                url = _redirected(target, answer.getheader("location"))
            except BaseException:
                connection.abort()
                raise
            connection.abort()
        raise FetchRefused(f"It redirects more than {MAX_REDIRECTS} times.")

    async def _connected(self, target: SplitResult, deadline: float) -> PinnedConnection:
        host, port = target.hostname or "", target.port or PORTS[target.scheme]
        try:
            async with asyncio.timeout(_RESOLVE_S):
                addresses = await self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchBroke(f"{host} cannot be resolved.") from error
        if any(not may_reach(address, self.allowed) for address in addresses):
            raise FetchRefused(
                f"{host} is at an address that imports may not reach. Only public addresses are, and networks "
                "that the operator allows."
            )
        why: FetchBroke | None = None
        for address in addresses:
            connection = PinnedConnection(address, target, self.tls)
            try:
                await self._aside(connection.connect, deadline, PACE_S)
                return connection
            except FetchBroke as error:
                connection.abort()
                why = error
            except BaseException:
                connection.abort()
                raise
        raise why or FetchBroke(f"{host} has no address.")

    async def _body(
        self, connection: PinnedConnection, begin: int, end: int | None, deadline: float
    ) -> AsyncIterator[bytes]:
        """begin: how many bytes of the file were there before. end: its size, if it was told."""
        if end is not None and end > self.max_bytes:
            raise self._too_large()
        size, pace, now = begin, _Pace(), asyncio.get_running_loop().time
        asked = now()
        while chunk := await self._aside(partial(connection.read, _CHUNK), deadline):
            pace.took(len(chunk), now() - asked)
            size += len(chunk)
            if size > self.max_bytes:
                raise self._too_large()
            yield chunk
            asked = now()
        if end is not None and size != end:
            raise FetchBroke(f"The connection broke after {size} of {end} bytes.")

    def _too_large(self) -> FetchRefused:
        return FetchRefused(f"It is larger than {self.max_bytes} bytes.", "import_too_large")

    async def _aside(self, work: Callable[[], T], deadline: float, at_most: float = math.inf) -> T:
        """In a thread, until the loop's time is `deadline`, and for so many seconds."""
        loop = asyncio.get_running_loop()
        try:
            working = loop.run_in_executor(self.threads, work)
            return await asyncio.wait_for(working, max(0.0, min(at_most, deadline - loop.time())))
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


def checked(url: str) -> SplitResult:
    """The parts of a URL that may be fetched. Raises FetchRefused."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise FetchRefused("It is no URL.") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise FetchRefused("It must begin with https:// or http:// and name a host.")
    if parts.username is not None or parts.password is not None:
        raise FetchRefused("It may carry no user name and password; use a URL that is signed.")
    if port == 0 or len(url) > MAX_URL or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise FetchRefused(f"It must be at most {MAX_URL} printable ASCII characters, percent-encoded.")
    return parts


def shown(url: str) -> str:
    """Without the query, which may hold a signature."""
    return url.partition("?")[0].partition("#")[0]


def _wanted(file: _File | None, begin: int) -> dict[str, str]:
    """The headers that ask for the rest of a file, if it is still the same (RFC 9110, 13.1.5 and 14.2)."""
    return {} if file is None else {"Range": f"bytes={begin}-", "If-Range": file.etag}


def _file(answer: HTTPResponse) -> _File:
    """Of the first answer."""
    etag = answer.getheader("etag") or ""
    offered = (answer.getheader("accept-ranges") or "").lower() == "bytes"
    return _File(etag if offered and _STRONG_ETAG.fullmatch(etag) else "", answer.length)


def _same(file: _File, answer: HTTPResponse, begin: int) -> _File:
    """The file, if the answer is the rest of it. Raises _Changed."""
    found = _CONTENT_RANGE.fullmatch(answer.getheader("content-range") or "")
    if found is None or int(found[1]) != begin or answer.getheader("etag") not in (None, file.etag):
        raise _changed()
    size = file.size if found[2] == "*" else int(found[2])
    if file.size not in (None, size):
        raise _changed()
    return _File(file.etag, size)


def _changed() -> _Changed:
    return _Changed("The connection broke, and the server does not go on with the same file.")


def _good(answer: HTTPResponse, *, part: bool) -> HTTPResponse:
    """part: the rest of a file was asked for."""
    if answer.status in (408, 425, 429) or answer.status >= 500:
        raise FetchBroke(f"The server answered {answer.status}.")
    if part and answer.status in (200, 412, 416):
        raise _changed()
    if answer.status != (206 if part else 200):
        raise FetchRefused(f"The server answered {answer.status}.", "import_failed")
    coding = (answer.getheader("content-encoding") or "identity").lower()
    if coding != "identity":
        raise FetchRefused(
            f"The server sends it encoded as {coding[:40]}, although it was asked not to.", "import_failed"
        )
    return answer


def _redirected(source: SplitResult, location: str | None) -> str:
    if not location:
        raise FetchRefused("It redirects, but not to anywhere.")
    try:
        target = urljoin(source.geturl(), location)
        scheme = urlsplit(target).scheme
    except ValueError as error:
        raise FetchRefused("It redirects to what is no URL.") from error
    if source.scheme == "https" and scheme == "http":
        raise FetchRefused("It redirects from https to http.")
    return target


def _origin(target: SplitResult) -> tuple[str, str | None, int]:
    return target.scheme, target.hostname, target.port or PORTS[target.scheme]
