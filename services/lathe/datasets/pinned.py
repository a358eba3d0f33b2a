"""An HTTP connection to one address, for a host that is only a name in it; it can be broken off at any moment."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import SplitResult

PORTS = {"http": 80, "https": 443}
_CONNECT_S = 10.0
_SILENCE_S = 30.0


class PinnedConnection(HTTPConnection):
    """Connects to `address`, and asks it for what a URL names. All block, one at a time, but for `abort`; all raise
    OSError, HTTPException or ValueError. tls: for https."""

    def __init__(self, address: str, target: SplitResult, tls: ssl.SSLContext) -> None:
        super().__init__(target.hostname or "", target.port or PORTS[target.scheme], timeout=_CONNECT_S)
        self._address = address
        self._tls = tls if target.scheme == "https" else None
        self._target = target
        self._line: socket.socket | None = None
        self._answer: HTTPResponse | None = None
        self._at_work = threading.Lock()
        self._aborted = False
        self.auto_open = 0
        # http.client writes the port into the Host header unless it is the scheme's own.
        self.default_port = PORTS[target.scheme]

    def connect(self) -> None:
        """Once."""
        with self._work():
            self.sock = self._line = socket.create_connection((self._address, self.port), _CONNECT_S)
            if self._tls is not None:
                # The hands are shaken later: whoever aborts must find the socket.
                self.sock = self._line = self._tls.wrap_socket(
                    self.sock, server_hostname=self.host, do_handshake_on_connect=False
                )
                if not self._aborted:
                    self.sock.do_handshake()
            self.sock.settimeout(_SILENCE_S)

    def ask(self, headers: Mapping[str, str]) -> HTTPResponse:
        """GET, once."""
        path = (self._target.path or "/") + (f"?{self._target.query}" if self._target.query else "")
        own = {"Accept-Encoding": "identity", "User-Agent": "lathe-import", "Connection": "close"}
        with self._work():
            self.request("GET", path, headers={**own, **headers})
            self._answer = self.getresponse()
            return self._answer

    def read(self, size: int) -> bytes:
        """Of the answer's body, what comes next, at most so many bytes; empty at its end."""
        with self._work():
            return self._answer.read1(size) if self._answer is not None else b""

    def abort(self) -> None:
        """Nothing more is wanted. A thread that still waits gets an error, whatever the other side does."""
        self._aborted = True
        # Not through http.client, which forgets a socket that ends with its answer, nor TLS, which would talk on.
        if self._line is not None:
            with suppress(OSError):
                socket.socket.shutdown(self._line, socket.SHUT_RDWR)
        self._end()

    @contextmanager
    def _work(self) -> Iterator[None]:
        try:
            with self._at_work:
                if self._aborted:
                    raise OSError("broken off")
                yield
        finally:
            if self._aborted:
                self._end()

    def _end(self) -> None:
        """Close what is open, unless a thread is at work with it: it does so itself then. (Whose number is free again
        must not be read from.)"""
        if self._at_work.acquire(blocking=False):
            try:
                if self._answer is not None:
                    self._answer.close()
                self.close()
            finally:
                self._at_work.release()
