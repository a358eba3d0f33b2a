"""An audit's chunks done in several processes. Spawned, never forked; a process that dies costs its chunks, which are
done again: the results come in the order of the file, so that nothing depends on who did what."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lathe.common.errors import Internal
from lathe.datasets.chunkwork import ChunkResult, ChunkWork
from lathe.text.jsonl import Line
from lathe.text.render import RenderOptions
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# How often in a row processes may die before the audit is given up: a chunk may be what kills them.
_DEATHS = 3
# Chunks ahead of the oldest one that is not done, for each process.
_AHEAD = 2
# Each takes some 150 MB.
_USUALLY_AT_MOST = 4


@dataclass(frozen=True, slots=True)
class Task:
    """What every chunk of an audit is done with. tokenizer: the folder with its files."""

    tokenizer: Path
    options: RenderOptions
    now: datetime


Chunk = Sequence[Line]
Do = Callable[[Chunk], ChunkResult]


@dataclass(slots=True)
class _Pending:
    lines: Chunk
    future: Future[ChunkResult]


class ChunkWorkers:
    """count: processes. do: what a process does with a chunk; tests give one that dies."""

    def __init__(self, task: Task, count: int, do: Do | None = None) -> None:
        self._task = task
        self._count = count
        self._do = do or _work
        self._executor = self._started()

    async def results(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[ChunkResult]:
        """In the order of the chunks. Raises Internal when processes die again and again, and what a chunk raises."""
        pending: deque[_Pending] = deque()
        async for lines in chunks:
            pending.append(_Pending(lines, self._submitted(lines)))
            if len(pending) >= _AHEAD * self._count:
                yield await self._oldest(pending)
        while pending:
            yield await self._oldest(pending)

    def close(self) -> None:
        """End the processes; what they still do is forgotten."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _oldest(self, pending: deque[_Pending]) -> ChunkResult:
        for _ in range(_DEATHS):
            try:
                result = await asyncio.wrap_future(pending[0].future)
            except BrokenProcessPool:
                log.warning("A process of an audit died; its chunks are done again.")
                self.close()
                self._executor = self._started()
                for item in pending:
                    item.future = self._submitted(item.lines)
                continue
            pending.popleft()
            return result
        first = pending[0].lines[0].number
        raise Internal(f"The processes of the audit died {_DEATHS} times at the lines from {first} on.")

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._task,),
        )

    def _submitted(self, lines: Chunk) -> Future[ChunkResult]:
        try:
            return self._executor.submit(self._do, lines)
        except BrokenProcessPool as error:
            # Told when its turn comes, as of a process that dies over it.
            failed: Future[ChunkResult] = Future()
            failed.set_exception(error)
            return failed


def usual_count() -> int:
    """One for each core that this process may use, but few: a container's limit on memory knows nothing of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _USUALLY_AT_MOST)


class _Worker:
    """Of this process, once it is one of an audit's."""

    task: Task
    work: ChunkWork | None = None


def _begin(task: Task) -> None:
    # Ctrl-C at `lathe up` reaches them too; their parent ends them when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.task = task


def _work(lines: Chunk) -> ChunkResult:
    if _Worker.work is None:
        # Not in _begin: what is raised there reaches nobody, it only ends the process.
        task = _Worker.task
        _Worker.work = ChunkWork(Tokenizer.from_folder(task.tokenizer), task.options, task.now)
    return _Worker.work.run(lines)


def _end_with_parent() -> None:
    """A killed parent closes nothing that a process waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
