"""The guard of imports over real sockets: what a name means is asked once, and checked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lathe.datasets.addresses import networks
from lathe.datasets.fetching import FetchBroke, Fetcher, FetchRefused

ROWS = b'{"a": 1}\n' * 1000


class Site(BaseHTTPRequestHandler):
    """`pages`: path -> what to do. `seen`: (path, host) of each request."""

    pages: dict[str, Callable[[Any], None]]
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        assert "authorization" not in self.headers
        self.pages[self.path](self)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[type[Site]]:
    class Own(Site):
        pass

    Own.pages, Own.seen = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.port = server.server_port  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield Own
    server.shutdown()
    server.server_close()


def fetcher(*answers: str, allowed: tuple[str, ...] = ("127.0.0.0/8",), **limits: Any) -> Fetcher:
    """Each question about a name is answered with the next address; the last one for ever."""
    left = list(answers) or ["127.0.0.1"]

    async def resolve(host: str, port: int) -> list[str]:
        return (left.pop(0) if len(left) > 1 else left[0]).split()

    return Fetcher(
        networks(allowed), **{"max_bytes": 1 << 20, "max_seconds": 10.0, **limits}, resolve=resolve
    )


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
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0"]
)
async def test_ways_to_write_the_inside(site: Any, host: str) -> None:
    plain = Fetcher((), 1 << 20, 10.0)
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
    for location in ("file:///etc/passwd", "http://user:pw@x/", ""):
        site.pages["/b"] = lambda it, to=location: it.answer(302, location=to)
        with pytest.raises(FetchRefused):
            await read(fetcher(), site, "/b")


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
            await asyncio.wait_for(read(fetcher(max_seconds=0.3), site, "/drips"), 5)
    finally:
        gone.set()


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
