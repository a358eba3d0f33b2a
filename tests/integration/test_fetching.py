"""The guard of imports over real sockets: what a name means is asked once, and checked."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lathe.datasets.addresses import networks
from lathe.datasets.fetching import MAX_STUCK, FetchBroke, Fetcher, FetchRefused, Secret
from tests.fixtures.certificates import Authority

ROWS = b'{"a": 1}\n' * 1000


class Site(BaseHTTPRequestHandler):
    """`pages`: path -> what to do. `seen`: (path, host) of each request; `secrets`: what it says of who asks."""

    pages: dict[str, Callable[[Any], None]]
    seen: list[tuple[str, str]]
    secrets: list[str]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        self.secrets.append(self.headers.get("authorization", ""))
        self.pages[self.path](self)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Any]:
    class Own(Site):
        pass

    Own.pages, Own.seen, Own.secrets = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    # It prints what its handlers raise: a client that hangs up is no news here.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    Own.port = server.server_port  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield Own
    server.shutdown()
    server.server_close()


@pytest.fixture
def site() -> Iterator[Any]:
    with serving() as own:
        yield own


def fetcher(*answers: str, allowed: tuple[str, ...] = ("127.0.0.0/8",), **limits: Any) -> Fetcher:
    """Each question about a name is answered with the next address; the last one for ever."""
    left = list(answers) or ["127.0.0.1"]

    async def resolve(host: str, port: int) -> list[str]:
        return (left.pop(0) if len(left) > 1 else left[0]).split()

    limits = {"max_bytes": 1 << 20, "max_seconds": 60.0, "pause": no_pause, **limits}
    return Fetcher(networks(allowed), **limits, resolve=resolve)


async def no_pause(_: float) -> None:
    pass


async def read(fetch: Fetcher, site: Any, path: str = "/a", host: str = "files.example.com") -> bytes:
    return b"".join([chunk async for chunk in fetch.fetch(f"http://{host}:{site.port}{path}")])


async def test_the_bytes_and_the_hosts_own_name(site: Any) -> None:
    site.pages["/a?x=1"] = lambda it: it.answer(200, ROWS)
    assert await read(fetcher(), site, "/a?x=1") == ROWS
    assert site.seen == [("/a?x=1", f"files.example.com:{site.port}")]


async def test_a_name_that_changes_its_mind_reaches_nothing_inside(site: Any) -> None:
    """DNS rebinding: a public address for the check, the inside for the connection. There is one question only."""
    site.pages["/a"] = lambda it: it.answer(200, b"the inside")
    # 192.0.2.1 is nobody's; the operator allows it here so that it counts as public.
    rebinding = fetcher("192.0.2.1", "127.0.0.1", allowed=("192.0.2.0/24",))
    connected: list[str] = []

    def refuse(address: tuple[str, int], *_: Any, **__: Any) -> None:
        connected.append(address[0])
        raise OSError("unreachable")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lathe.datasets.fetching.socket.create_connection", refuse)
        with pytest.raises(FetchBroke):
            await read(rebinding, site)
    assert connected == ["192.0.2.1"]
    # Asked again, it means the inside, and that is refused before anything is connected to.
    with pytest.raises(FetchRefused, match="may not reach"):
        await read(rebinding, site)
    with pytest.raises(FetchRefused):
        await read(fetcher("192.0.2.1 127.0.0.1", allowed=("192.0.2.0/24",)), site)
    assert site.seen == []


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "public.example\\@127.0.0.1"),
    ],
)
async def test_ways_to_write_the_inside(site: Any, host: str) -> None:
    plain = Fetcher((), 1 << 20, 60.0)
    with pytest.raises((FetchRefused, FetchBroke)):
        await read(plain, site, host=host)
    assert site.seen == []


async def test_every_redirect_is_checked_again(site: Any) -> None:
    port = site.port
    site.pages["/a"] = lambda it: it.answer(302, location="/b")
    site.pages["/b"] = lambda it: it.answer(307, location=f"http://other.example.com:{port}/c")
    site.pages["/c"] = lambda it: it.answer(200, ROWS)
    assert await read(fetcher(), site) == ROWS
    with pytest.raises(FetchRefused, match="may not reach"):
        await read(fetcher("127.0.0.1", "127.0.0.1", "169.254.169.254"), site)
    assert [path for path, _ in site.seen] == ["/a", "/b", "/c", "/a", "/b"]
    site.pages["/a"] = lambda it: it.answer(302, location="/a")
    with pytest.raises(FetchRefused, match="more than 5"):
        await read(fetcher(), site)
    for location, why in (
        ("file:///etc/passwd", "begin with"),
        ("http://user:pw@x/", "user name"),
        ("//[::1", "no URL"),
        ("/\xff", "ASCII"),
        ("", "not to anywhere"),
    ):
        site.pages["/b"] = lambda it, to=location: it.answer(302, location=to)
        with pytest.raises(FetchRefused, match=why):
            await read(fetcher(), site, "/b")
    assert set(site.secrets) == {""}


async def test_https_is_for_the_name_and_never_goes_on_without(site: Any, tmp_path: Path) -> None:
    authority = Authority()
    files = authority.mount(tmp_path / "tls", ["files.example.com"])
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(files.cert, files.key)
    trusting = replace(fetcher(), tls=ssl.create_default_context(cadata=authority.pem.decode()))

    async def fetched(fetch: Fetcher, url: str) -> bytes:
        return b"".join([chunk async for chunk in fetch.fetch(url)])

    with serving(server) as secure:
        begin = f"https://files.example.com:{secure.port}"
        secure.pages["/a"] = lambda it: it.answer(302, location="/b")
        secure.pages["/b"] = lambda it: it.answer(200, ROWS)
        secure.pages["/c"] = lambda it: it.answer(302, location=f"http://files.example.com:{site.port}/a")
        site.pages["/a"] = lambda it: it.answer(302, location=f"{begin}/b")
        assert await fetched(trusting, f"{begin}/a") == await read(trusting, site) == ROWS
        with pytest.raises(FetchRefused, match="from https to http"):
            await fetched(trusting, f"{begin}/c")
        for fetch, url in ((fetcher(), begin), (trusting, begin.replace("files", "other"))):
            with pytest.raises(FetchRefused, match="certificate is not trusted"):
                await fetched(fetch, f"{url}/a")
    assert [path for path, _ in secure.seen] == ["/a", "/b", "/b", "/c"]
    assert len(site.seen) == 1


async def test_no_proxy_of_the_environment(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/a"] = lambda it: it.answer(200, ROWS)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert await read(fetcher(), site) == ROWS


async def test_limits(site: Any) -> None:
    site.pages["/a"] = lambda it: it.answer(200, ROWS)
    with pytest.raises(FetchRefused) as refused:
        await read(fetcher(max_bytes=100), site)
    assert refused.value.code == "import_too_large"

    def endless(it: Any) -> None:
        it.send_response(200)
        it.end_headers()
        for _ in range(1000):
            it.wfile.write(b"x" * 1000)

    site.pages["/endless"] = endless
    with pytest.raises(FetchRefused) as refused:
        await read(fetcher(max_bytes=10_000), site, "/endless")
    assert refused.value.code == "import_too_large"
    gone = threading.Event()

    def drips(it: Any) -> None:
        it.wfile.write(b"HTTP/1.0 200 OK\r\nx: ")
        while not gone.wait(0.05):
            it.wfile.write(b"y")

    site.pages["/drips"] = drips
    try:
        with pytest.raises(FetchRefused, match="longer"):
            await asyncio.wait_for(read(fetcher(max_seconds=0.3), site, "/drips"), 30)
    finally:
        gone.set()


class Later:
    """The loop's clock, which may be put forward."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.by = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        patch.setattr(loop, "time", lambda: real() + self.by)


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 200000\r\n"


async def test_a_server_that_sends_its_head_byte_by_byte_holds_nobody_for_long(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, begun, gone = Later(monkeypatch), threading.Event(), threading.Event()

    def drips(it: Any) -> None:
        it.wfile.write(HEAD + b"x: ")
        begun.set()
        while not gone.wait(0.02):
            it.wfile.write(b"y")

    site.pages["/a"] = drips
    try:
        reading = asyncio.create_task(read(fetcher(max_seconds=1000.0), site))
        await asyncio.to_thread(begun.wait)
        later.by = 100.0
        with pytest.raises(FetchBroke, match="silent"):
            await reading
    finally:
        gone.set()


async def test_a_server_that_sends_a_byte_now_and_then_holds_nobody_for_long(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, waited = Later(monkeypatch), threading.Event()

    def two_bytes(it: Any) -> None:
        it.wfile.write(HEAD + b"\r\nx")
        waited.wait()
        it.wfile.write(b"x")

    site.pages["/a"] = two_bytes
    chunks = fetcher(max_seconds=1000.0).fetch(f"http://127.0.0.1:{site.port}/a")
    assert await anext(chunks) == b"x"
    second = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0)
    later.by = 100.0
    waited.set()
    with pytest.raises(FetchBroke, match=r"too slow: it sent 2 bytes in 1\d\d seconds"):
        await second


async def test_what_is_done_with_the_bytes_meanwhile_is_not_the_servers_time(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, taken = Later(monkeypatch), threading.Event()

    def halves(it: Any) -> None:
        it.wfile.write(HEAD + b"\r\n" + b"x" * 100_000)
        taken.wait()
        it.wfile.write(b"x" * 100_000)

    site.pages["/a"] = halves
    size = 0
    async for chunk in fetcher(max_seconds=1000.0).fetch(f"http://127.0.0.1:{site.port}/a"):
        size += len(chunk)
        if not taken.is_set():
            later.by = 100.0
            taken.set()
    assert size == 200_000


async def test_answers_that_are_no_file(site: Any) -> None:
    site.pages["/bomb"] = lambda it: it.answer(200, b"\x1f\x8b", content_encoding="gzip")
    site.pages["/gone"] = lambda it: it.answer(404)
    site.pages["/busy"] = lambda it: it.answer(503)
    site.pages["/short"] = lambda it: it.answer(200, b"abc", content_length="10")
    for path, error in (
        *(("/bomb", FetchRefused), ("/gone", FetchRefused)),
        *(("/busy", FetchBroke), ("/short", FetchBroke)),
    ):
        with pytest.raises(error):
            await read(fetcher(), site, path)


async def test_whoever_drips_loses_its_connection(site: Any) -> None:
    """In the body, where http.client has forgotten the socket."""
    noticed = threading.Event()

    def drips(it: Any) -> None:
        it.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        try:
            while not noticed.wait(0.02):
                it.wfile.write(b"y")
        except OSError:
            noticed.set()

    site.pages["/drips"] = drips
    body = fetcher().fetch(f"http://files.example.com:{site.port}/drips")
    assert b"y" in await anext(body)
    await body.aclose()
    try:
        assert await asyncio.to_thread(noticed.wait, 30)
    finally:
        noticed.set()


async def test_whoever_drips_its_handshake_loses_its_connection() -> None:
    """Else a thread would be its for ever."""
    begun, noticed = asyncio.Event(), asyncio.Event()

    async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A record of TLS that announces 16 KiB.
        writer.write(b"\x16\x03\x03\x40\x00")
        try:
            await reader.read(1)
            begun.set()
            while True:
                writer.write(b"\x02")
                await writer.drain()
                await asyncio.sleep(0.02)
        except OSError:
            noticed.set()
        finally:
            writer.close()

    async with await asyncio.start_server(drips, "127.0.0.1", 0) as server:
        url = f"https://files.example.com:{server.sockets[0].getsockname()[1]}/a"
        asked = asyncio.ensure_future(anext(fetcher().fetch(url)))
        await asyncio.wait_for(begun.wait(), 30)
        asked.cancel()
        # Or TimeoutError: the connection was never closed.
        assert await asyncio.wait_for(noticed.wait(), 30)


# --- going on where a connection broke ---------------------------------------------------------------------------

FILE = bytes(range(256)) * 16384


class Cutting:
    """A file whose server sends `each` bytes of it a connection. tags: its ETag at each request, the last for ever."""

    def __init__(self, each: int, *tags: str, offers: str = "bytes", fails: int = 0) -> None:
        self.each = each
        self.tags = list(tags) or ['"v1"']
        self.offers = offers
        self.fails = fails
        self.asked: list[str | None] = []

    def __call__(self, it: Any) -> None:
        wanted = it.headers["range"]
        self.asked.append(wanted)
        tag = self.tags.pop(0) if len(self.tags) > 1 else self.tags[0]
        if wanted and self.fails:
            self.fails -= 1
            it.answer(503)
            return
        begin = 0
        if wanted and it.headers["if-range"] == tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            it.send_response(206)
            it.send_header("Content-Range", f"bytes {begin}-{len(FILE) - 1}/{len(FILE)}")
        else:
            it.send_response(200)
        it.send_header("Content-Length", str(len(FILE) - begin))
        it.send_header("ETag", tag)
        it.send_header("Accept-Ranges", self.offers)
        it.end_headers()
        it.wfile.write(FILE[begin : begin + self.each])


def resuming(pauses: list[float] | None = None, **limits: Any) -> Fetcher:
    async def pause(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    return fetcher(**{"max_bytes": 8 << 20, "max_seconds": 1000.0, "pause": pause, **limits})


async def test_a_broken_fetch_goes_on_where_it_was(site: Any) -> None:
    site.pages["/a"] = file = Cutting(1_500_000, fails=2)
    pauses: list[float] = []
    digest = hashlib.sha256(await read(resuming(pauses), site)).hexdigest()
    assert digest == hashlib.sha256(FILE).hexdigest()
    assert file.asked == [None, *["bytes=1500000-"] * 3, "bytes=3000000-"]
    assert pauses == [1, 2, 4, 1]


async def test_what_makes_no_progress_is_given_up(site: Any) -> None:
    site.pages["/a"] = file = Cutting(1000)
    pauses: list[float] = []
    with pytest.raises(FetchBroke, match="broke after 6000 of"):
        await read(resuming(pauses), site)
    assert len(file.asked) == MAX_STUCK + 1 and pauses == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("file", "requests"),
    [
        (Cutting(2_000_000, '"v1"', '"v2"'), 2),
        (Cutting(2_000_000, 'W/"v1"'), 1),
        (Cutting(2_000_000, "v1"), 1),
        (Cutting(2_000_000, offers="none"), 1),
        (Cutting(0), 1),
    ],
)
async def test_what_cannot_be_gone_on_with_begins_again_another_time(
    site: Any, file: Cutting, requests: int
) -> None:
    site.pages["/a"] = file
    got = bytearray()
    with pytest.raises(FetchBroke):
        async for chunk in resuming().fetch(f"http://files.example.com:{site.port}/a"):
            got += chunk
    assert len(file.asked) == requests and bytes(got) == FILE[: file.each]


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 0-9/10",
        f"bytes 99-{len(FILE) - 1}/{len(FILE)}",
        f"bytes 100-{len(FILE) - 1}/5",
        "bytes 99-/x",
        "items 100-9/9",
    ],
)
async def test_a_wrong_part_is_not_taken(site: Any, content_range: str) -> None:
    def page(it: Any) -> None:
        if it.headers["range"]:
            it.answer(206, FILE[100:], content_range=content_range, etag='"v1"')
        else:
            it.answer(200, FILE[:100], content_length=str(len(FILE)), etag='"v1"', accept_ranges="bytes")

    site.pages["/a"] = page
    with pytest.raises(FetchBroke, match="same file"):
        await read(resuming(), site)
    assert len(site.seen) == 2


async def test_going_on_is_checked_like_the_beginning(site: Any) -> None:
    """The name may mean the inside by then, and a file may grow without end."""
    site.pages["/a"] = Cutting(2_000_000)
    with pytest.raises(FetchRefused, match="may not reach"):
        await read(fetcher("127.0.0.1", "10.0.0.1", max_bytes=8 << 20), site)
    with pytest.raises(FetchRefused, match="larger"):
        await read(resuming(max_bytes=len(FILE) - 1), site)


async def test_a_secret_stays_with_its_host(site: Any) -> None:
    site.pages["/a"] = lambda it: it.answer(302, location="/b")
    site.pages["/b"] = lambda it: it.answer(302, location=f"http://cdn.example.com:{site.port}/c")
    site.pages["/c"] = lambda it: it.answer(200, ROWS)
    secret = Secret(f"http://hub.example.com:{site.port}", "Bearer hf_x")
    url = f"http://hub.example.com:{site.port}/a"
    assert b"".join([chunk async for chunk in fetcher().fetch(url, secret)]) == ROWS
    assert site.secrets == ["Bearer hf_x", "Bearer hf_x", ""]
