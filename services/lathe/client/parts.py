"""Parts of a file straight to the object store, by URLs that the platform signed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import IO
from urllib.parse import urlsplit

from lathe.client.content import ContentDigest
from lathe.client.transport import Transport, pause
from lathe.common.errors import Unavailable
from lathe.v1 import datasets_pb2 as pb
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub

log = logging.getLogger(__name__)

# One connection alone does not fill a long line.
_AT_ONCE = 4
_BLOCK_BYTES = 1024 * 1024
_TIMEOUT_S = 30.0
_REFUSED = Unavailable("The object store does not take the parts of the file; try again.")


class StoreOutOfReach(Exception):
    """Not one part could be sent: this client does not reach the store, whatever the platform believes."""


class PartsUpload:
    """Sends what is missing until nothing is. A part that broke, or whose URL expired, is signed and sent again."""

    def __init__(
        self,
        transport: Transport,
        stub: DatasetsServiceStub,
        name: str,
        digest: ContentDigest,
        progress: Callable[[int], None],
    ) -> None:
        """progress: is told how many bytes are stored."""
        self._transport = transport
        self._stub = stub
        self._name = name
        self._content = digest.content
        self._digest = digest
        self._progress = progress
        self._tls = transport.tls_context()

    def run(self) -> pb.Dataset:
        """The dataset, VALIDATING or further.

        Raises StoreOutOfReach, Unavailable when no part was stored for the client's timeout, InvalidArgument when the
        file changed meanwhile.
        """
        with self._digest.made_beside() as sha256:
            self._send_all()
            self._progress(self._content.size)
            self._content.check_unchanged()
            request = pb.CompleteUploadSessionRequest(name=self._name, sha256=sha256())
        return self._transport.call(self._stub.CompleteUploadSession, request).dataset

    def _send_all(self) -> None:
        best: int | None = None
        # Set by the first round that stored nothing more.
        deadline: float | None = None
        while (signed := self._signed()).parts:
            missing = signed.missing_bytes
            if best is not None and missing >= best:
                if best == self._content.size:
                    raise StoreOutOfReach
                deadline = deadline or time.monotonic() + self._transport.timeout
                pause(_REFUSED, deadline)
            else:
                best, deadline = missing, None
            self._send(signed)

    def _signed(self) -> pb.SignUploadPartsResponse:
        request = pb.SignUploadPartsRequest(name=self._name)
        return self._transport.call(self._stub.SignUploadParts, request)

    def _send(self, signed: pb.SignUploadPartsResponse) -> None:
        """Each part once. What was stored, the next round knows: the answer to a part may be lost, too."""
        done = self._content.size - signed.missing_bytes
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as threads:
            running: dict[Future[None], int] = {
                threads.submit(self._put, part): part.size_bytes for part in signed.parts
            }
            try:
                for one in as_completed(running):
                    try:
                        one.result()
                    except (OSError, HTTPException) as error:
                        log.debug("A part of %s was not stored: %s", self._name, error)
                        continue
                    done += running[one]
                    self._progress(done)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _put(self, part: pb.SignedPart) -> None:
        url = urlsplit(part.url)
        with closing(self._connection(url.scheme, url.netloc)) as connection, self._content.opened() as file:
            file.seek(part.offset)
            target = f"{url.path}?{url.query}"
            headers = {"Content-Length": str(part.size_bytes)}
            connection.request("PUT", target, _limited(file, part.size_bytes), headers)
            answer = connection.getresponse()
            said = answer.read()
        if answer.status != 200:
            raise HTTPException(f"part {part.number}: {answer.status} {said[:300]!r}")

    def _connection(self, scheme: str, address: str) -> HTTPConnection:
        if scheme == "https":
            return HTTPSConnection(address, timeout=_TIMEOUT_S, context=self._tls)
        return HTTPConnection(address, timeout=_TIMEOUT_S)


def _limited(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(_BLOCK_BYTES, size))):
        size -= len(data)
        yield data
