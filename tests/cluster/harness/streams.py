"""Chats that are always open while something is killed, and how each of them ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lathe.client import Client
from lathe.common.errors import LatheError
from tests.e2e.data import ask
from tests.fixtures.platforms import Platform

QUESTION = ask("Tell me everything about kettles.")
# Longer than any that is not stuck.
STREAM_S = 120.0
AT_A_TIME = 3
APART_S = 0.4


@dataclass(eq=False)
class Ended:
    """One stream. Times are monotonic seconds; error is empty for one that came to its own end."""

    opened: float
    last: float
    ended: float = 0.0
    chunks: int = 0
    error: str = ""

    @property
    def silent_s(self) -> float:
        """How long it stood still before it ended."""
        return self.ended - self.last


@dataclass
class Streams:
    """Several at a time, each opening one stream after the other until `stopped`: one is always in the middle."""

    platform: Platform
    model: str
    ended: list[Ended] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    current: list[Ended] = field(default_factory=list)

    def run(self) -> None:
        with Client(self.platform.grpc, self.platform.api_key, timeout=10) as client:
            while not self.stopped.is_set():
                now = time.monotonic()
                one = Ended(now, now)
                self.current.append(one)
                try:
                    for _ in client.chat_stream(
                        self.model, QUESTION, timeout=STREAM_S, temperature=1, max_tokens=400
                    ):
                        one.last = time.monotonic()
                        one.chunks += 1
                        if self.stopped.is_set():
                            break
                except LatheError as error:
                    one.error = f"{type(error).__name__}: {error.message}"
                    time.sleep(0.2)
                one.ended = time.monotonic()
                self.current.remove(one)
                self.ended.append(one)

    def wait_open(self, timeout: float = 120.0) -> None:
        """Until a stream has brought its first words."""
        deadline = time.monotonic() + timeout
        while not any(one.chunks for one in self.current):
            assert time.monotonic() < deadline, f"no stream opened: {[one.error for one in self.ended[-3:]]}"
            time.sleep(0.05)

    def broken_after(self, moment: float) -> list[Ended]:
        """Those that had begun to answer before `moment` and did not come to their end."""
        return [one for one in self.ended if one.opened < moment < one.ended and one.error and one.chunks]

    def served_after(self, moment: float) -> bool:
        return any(one.opened > moment and one.chunks and not one.error for one in self.ended)

    def check_none_hung(self, longest_s: float) -> None:
        """No stream stood still for longer than that before it ended."""
        hung = [one for one in self.ended if one.chunks and one.silent_s > longest_s]
        assert not hung, f"streams that stood still: {hung}"


@contextmanager
def open_streams(platform: Platform, model: str) -> Iterator[Streams]:
    """Streams of `model` while inside; the first one is open already."""
    streams = Streams(platform, model)
    threads = [
        threading.Thread(target=streams.run, name=f"streams-{n}", daemon=True) for n in range(AT_A_TIME)
    ]
    for thread in threads:
        thread.start()
        time.sleep(APART_S)
    try:
        streams.wait_open()
        yield streams
    finally:
        streams.stopped.set()
        for thread in threads:
            thread.join(STREAM_S + 10)
