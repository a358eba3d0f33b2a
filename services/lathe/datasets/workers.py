"""Who does the work of an audit: threads of this process, or processes of its own. These are spawned, never forked; one
that dies costs what was in hand, which is done again; work that none survives is done in its parts, each alone. Results
come in the order of the work, so that nothing depends on who did what."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lathe.common.errors import Internal
from lathe.datasets.chunkwork import Chunk, ChunkResult, ChunkWork
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# How often in a row processes may die before that is held against the work.
_DEATHS = 3
# Work ahead of the oldest that is not done, for each process.
_AHEAD = 2
# What a process still has to end with what is in hand: some chunks, but not a search for duplicates.
_LAST_S = 1.0
# Each takes some 250 MB.
_USUALLY_AT_MOST = 4

# What the rows of a chunk may take in a process, beside the tokenizer; the heaviest rows take half of it.
CHUNK_MEMORY_BYTES = 1 << 30

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Parts(Generic[R]):
    """Work that can be done in parts. join: the result of the whole, of those of its parts in their order; None for one
    that no process survives."""

    works: Sequence[Work[R]]
    join: Callable[[Sequence[R | None]], R]


@dataclass(frozen=True, slots=True)
class Work(Generic[R]):
    """do: whoever does it, and how often, the result is the same; another process is sent it pickled. It may raise
    MemoryError. name: what it is. parts: of work that may be what its processes die of."""

    do: Callable[[], R]
    name: str
    parts: Callable[[], Parts[R]] | None = None


class ProcessesDied(Internal):
    """No process survives some work."""


class Workers(Protocol):
    """Raise what the work raises."""

    def results(self, works: AsyncIterator[Work[R]]) -> AsyncGenerator[R, None]:
        """In the order of the works. Raises Internal for one that cannot be done."""
        ...

    async def result(self, work: Work[R]) -> R:
        """Of one. Raises Internal if it cannot be done."""
        ...


class Threads:
    """One at a time."""

    async def results(self, works: AsyncIterator[Work[R]]) -> AsyncGenerator[R, None]:
        async for work in works:
            yield await self.result(work)

    async def result(self, work: Work[R]) -> R:
        return await asyncio.to_thread(work.do)


@dataclass(slots=True)
class _Pending(Generic[R]):
    """future: None before the work is handed to a process."""

    work: Work[R]
    future: Future[R] | None = None


class Processes:
    """So many at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._context = multiprocessing.get_context("spawn")
        # Nothing is ever sent: each process ends when _open is closed.
        self._closed, self._open = self._context.Pipe(duplex=False)
        self._executor = self._started()

    async def results(self, works: AsyncIterator[Work[R]]) -> AsyncGenerator[R, None]:
        pending: deque[_Pending[R]] = deque()
        async for work in works:
            pending.append(_Pending(work, self._submitted(work)))
            if len(pending) >= _AHEAD * self._count:
                yield await self._oldest(pending)
        while pending:
            yield await self._oldest(pending)

    async def result(self, work: Work[R]) -> R:
        return await self._oldest(deque([_Pending(work, self._submitted(work))]))

    def close(self) -> None:
        """End the processes; what they still do is forgotten, and broken off where it takes long."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._open.close()
        self._closed.close()

    async def _oldest(self, pending: deque[_Pending[R]]) -> R:
        """The result of the first of them, which it takes away. Raises ProcessesDied."""
        for _ in range(_DEATHS):
            try:
                result = await asyncio.wrap_future(self._handed_out(pending))
            except MemoryError:
                # Its process lives, and would not have more the next time.
                break
            except BrokenProcessPool:
                log.warning("A process of an audit died; what it had in hand is done again.")
                self._restart(pending)
                continue
            pending.popleft()
            return result
        # After a death nothing else is in hand that its parts could die of.
        work = pending.popleft().work
        words = f"The processes of the audit died {_DEATHS} times, or had too little memory, at {work.name}."
        if work.parts is None:
            raise ProcessesDied(words)
        parts = work.parts()
        results = await self._survived(parts.works)
        if len(results) > 1 and all(result is None for result in results):
            # It is not the work that they die of: somebody ends them, or the machine has no memory left.
            raise ProcessesDied(words)
        return parts.join(results)

    def _handed_out(self, pending: deque[_Pending[R]]) -> Future[R]:
        """That of the first; all of them are with the processes then."""
        futures = []
        for item in pending:
            item.future = item.future or self._submitted(item.work)
            futures.append(item.future)
        return futures[0]

    async def _survived(self, works: Sequence[Work[R]]) -> list[R | None]:
        """Their results, one after another; None where no process survives."""
        results: list[R | None] = []
        for work in works:
            try:
                result: R = await self.result(work)
                results.append(result)
            except ProcessesDied as error:
                log.warning("%s", error.message)
                results.append(None)
        return results

    def _restart(self, pending: deque[_Pending[R]]) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = self._started()
        for item in pending:
            item.future = None

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._count, mp_context=self._context, initializer=_begin, initargs=(self._closed,)
        )

    def _submitted(self, work: Work[R]) -> Future[R]:
        try:
            return self._executor.submit(work.do)
        except BrokenProcessPool as error:
            # Told when its turn comes, as of a process that dies over it.
            failed: Future[R] = Future()
            failed.set_exception(error)
            return failed


def usual_count(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """One for each core that this process may use, but few: a limit on memory knows nothing of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(groups), _USUALLY_AT_MOST))


def _quota(groups: Path) -> int:
    """The cores that a container's limit lets it use."""
    try:
        quota, period = (groups / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return _USUALLY_AT_MOST
    return _USUALLY_AT_MOST if quota == "max" else int(quota) // int(period)


@dataclass(frozen=True, slots=True)
class Task:
    """What every chunk of an audit is done with. tokenizer: the folder with its files."""

    tokenizer: Path
    options: RenderOptions
    now: datetime


def run_chunk(task: Task, lines: Chunk) -> ChunkResult:
    """The chunk's result; the tokenizer of the last task is kept. Raises MemoryError, or ends its process, where the
    rows take more than CHUNK_MEMORY_BYTES."""
    work = _chunk_work(task)
    with limited_memory(CHUNK_MEMORY_BYTES):
        return work.run(lines)


@contextmanager
def limited_memory(size: int) -> Iterator[None]:
    """So many bytes may be taken beside what this process has, where its system tells how many these are."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[5])
    except FileNotFoundError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_DATA, (_lower(wanted, soft, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _lower(*limits: int) -> int:
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


@lru_cache(maxsize=1)
def _chunk_work(task: Task) -> ChunkWork:
    return ChunkWork(Tokenizer.from_folder(task.tokenizer), task.options, task.now)


def _begin(closed: Connection) -> None:
    # Ctrl-C at `lathe up` reaches them too; their parent ends them when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_at_last, args=(closed,), daemon=True).start()


def _end_at_last(closed: Connection) -> None:
    """End this process once the other end is closed, as it also is when the parent is killed."""
    closed.poll(None)
    # What is done by then ends as it should: nobody can read half a result.
    time.sleep(_LAST_S)
    os._exit(1)
