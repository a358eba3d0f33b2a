"""Datasets that the platform fetches by itself."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2
from tests.e2e.data import jsonl, lessons

READY, ERROR = datasets_pb2.DATASET_STATE_READY, datasets_pb2.DATASET_STATE_ERROR
CONTENT = jsonl(lessons())


class Site(BaseHTTPRequestHandler):
    """Hangs up in the middle of each first answer."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        if not self.path.startswith("/lessons.jsonl"):
            self.send_error(404)
            return
        begin = int((self.headers["range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if begin else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[begin : None if begin else len(CONTENT) // 2])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.own_platform
def test_from_a_server_that_breaks_off(client: Client, site: str) -> None:
    made = client.datasets.import_from(f"{site}/lessons.jsonl?sig=secret")
    assert (made.display_name, made.source) == ("lessons.jsonl", f"{site}/lessons.jsonl")
    found = client.datasets.wait(made.name)
    assert (found.state, found.sha256) == (READY, hashlib.sha256(CONTENT).hexdigest()), found.report
    assert b"".join(client.datasets.download(found.name)) == CONTENT


@pytest.mark.own_platform
def test_what_is_refused_says_why(client: Client, site: str) -> None:
    for source, code in (
        ("http://169.254.169.254/latest/meta-data", "import_refused"),
        ("s3://nobodys-bucket/lessons.jsonl", "import_refused"),
        (f"{site}/other.jsonl", "import_failed"),
    ):
        found = client.datasets.wait(client.datasets.import_from(source).name)
        assert found.state == ERROR
        assert [finding.code for finding in found.report.findings] == [code]
