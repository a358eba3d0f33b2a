"""Runs audits: one at a time, beside the event loop, restartable."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lathe.common.errors import LatheError, NotFound, RetryableError, Unavailable
from lathe.common.objectstore.base import ObjectStore, local_disk
from lathe.datasets.blobs import blob_chunks, fetch_blob, file_sha256
from lathe.datasets.chunkwork import Chunk, Chunker, ChunkResult, ChunkWork, joined
from lathe.datasets.collecting import Collector, Outcome, overlap_finding
from lathe.datasets.folders import work_folder
from lathe.datasets.model import (
    AUDIT_BEGINS,
    AuditResult,
    AuditState,
    AuditTask,
    blob_key,
    report_of,
    whole_file,
)
from lathe.datasets.ports import DatasetStore
from lathe.datasets.service import render_options
from lathe.datasets.tokenizers import TokenizerCache
from lathe.datasets.workers import Parts, Processes, Task, Threads, Work, Workers, run_chunk
from lathe.text import VERSION
from lathe.text.arrow import TokenWriter
from lathe.text.duplicates import read_duplicates, write_duplicates
from lathe.text.findinglines import FindingLines
from lathe.text.findings import Tally
from lathe.text.render import RenderOptions
from lathe.text.template import TRAINING_DATE

log = logging.getLogger(__name__)


# A process takes a second or two to start, in which about so much is audited.
BYTES_A_WORKER = 8 << 20


class Auditor:
    """Makes the token objects of RUNNING audits. It can die anywhere: the audit stays RUNNING and is made again,
    to the same bytes."""

    def __init__(
        self,
        store: DatasetStore,
        objects: ObjectStore,
        folder: Path,
        tokenizers: TokenizerCache | None = None,
        *,
        workers: int = 1,
        bytes_a_worker: int = BYTES_A_WORKER,
    ) -> None:
        """workers: at most so many processes; bytes_a_worker: smaller files have none, larger ones another one for each
        so many bytes."""
        self._most = workers
        self._bytes_a_worker = bytes_a_worker
        self._store = store
        self._objects = objects
        self._tokenizers = tokenizers or TokenizerCache(objects, folder)
        self._work = folder / "audits"

    async def start(self) -> None:
        """Forget what failed through Lathe's own fault (this process may be a mended one), and what a process that
        was killed left half-written."""
        await asyncio.to_thread(shutil.rmtree, self._work, ignore_errors=True)
        await self._store.forget_failed_audits(begins=AUDIT_BEGINS)

    async def step(self) -> None:
        """Run all audits there are now, one after another. Raises Unavailable if one of them has to wait."""
        waiting: RetryableError | None = None
        for task in await self._store.running_audits():
            try:
                await self.run(task)
            except RetryableError as error:
                waiting = error
            except Exception:
                # One audit that cannot be finished must not keep the others waiting.
                log.exception("Audit %s could not be finished and is made again.", task.key)
                waiting = Unavailable(f"Audit {task.key} could not be finished.", retry_after=2)
        if waiting is not None:
            raise waiting

    async def run(self, task: AuditTask) -> None:
        """RUNNING -> READY or ERROR. Raises Unavailable while something is away."""
        begins = await self._store.begin_audit(task.key)
        if begins > AUDIT_BEGINS:
            words = f"it was begun {AUDIT_BEGINS} times and ended its process, or broke off; see the log of datasets"
            await self._fail(task, words)
            return
        try:
            await self._run(task)
        except (RetryableError, asyncio.CancelledError):
            await self._store.end_audit_try(task.key)
            raise

    async def _run(self, task: AuditTask) -> None:
        async with work_folder("audit-", self._work) as folder:
            files = AuditFiles(*(folder / name for name in ("tokens.arrow", "duplicates", "findings.arrow")))
            try:
                outcome = await (
                    self._tokenise(task, files) if task.compared is None else self._compare(task, files)
                )
            except RetryableError:
                raise
            except NotFound as error:
                # The dataset or the base model was deleted; whoever asks again hears that it is not there.
                log.info("Audit %s is dropped: %s", task.key, error.message)
                await self._store.drop_running_audit(task.key)
                return
            except Exception as error:
                log.exception("Audit %s failed.", task.key)
                words = error.message if isinstance(error, LatheError) else f"the log has it under {task.key}"
                await self._fail(task, words)
                return
            await self._keep(task, outcome, files)

    async def _fail(self, task: AuditTask, words: str) -> None:
        report = whole_file("server_error", f"The audit failed: {words}")
        await self._store.finish_audit(task.key, AuditState.FAILED, report, AuditResult())

    async def _keep(self, task: AuditTask, outcome: Outcome, files: AuditFiles) -> None:
        """Store what an audit made, and finish it."""
        result = outcome.result
        objects = [(result.sha256, files.tokens), (result.findings_sha256, files.findings)]
        # The row says which blobs it needs before anyone could delete equal ones.
        await self._store.set_audit_objects(task.key, result.sha256, result.findings_sha256)
        for sha256, path in objects:
            if not sha256:
                continue
            if await self._store.is_claimed(sha256):
                raise Unavailable(
                    "An earlier copy of an audit's object is still being deleted.", retry_after=1
                )
            await self._objects.put_file(blob_key(sha256), path)
        state = AuditState.ERROR if outcome.report.has_errors else AuditState.READY
        await self._store.finish_audit(task.key, state, outcome.report, result)

    async def _tokenise(self, task: AuditTask, files: AuditFiles) -> Outcome:
        """Write the token object and the findings."""
        options = render_options(task.options)
        metadata = {
            "key": task.key,
            "text": VERSION,
            "dataset": task.dataset_sha256,
            "tokenizer": task.tokenizer_digest,
            "template": task.template_digest,
            "options": options.canonical(),
        }
        found = await self._objects.head(blob_key(task.dataset_sha256))
        size = found.size if found is not None else 0
        async with self._workers_for(size, self._most) as workers:
            do = await self._chunk_work(task, options, workers)
            with local_disk(files.tokens), TokenWriter(files.tokens, metadata) as writer:
                collector = Collector(writer)
                async with aclosing(workers.results(self._works(task.dataset_sha256, do))) as results:
                    async for result in results:
                        # In a thread: the event loop stays free.
                        await asyncio.to_thread(collector.add, result)
            await _search(workers, files, files.tokens)
        return await asyncio.to_thread(_concluded, collector, files, metadata)

    @asynccontextmanager
    async def _workers_for(self, size: int, most: int) -> AsyncIterator[Workers]:
        """Processes where there is so much to do that starting them is worth it. size: bytes to read."""
        if size < self._bytes_a_worker:
            yield Threads()
            return
        processes = await asyncio.to_thread(Processes, min(most, 1 + size // self._bytes_a_worker))
        try:
            yield processes
        finally:
            processes.close()

    async def _chunk_work(
        self, task: AuditTask, options: RenderOptions, workers: Workers
    ) -> Callable[[Chunk], ChunkResult]:
        if isinstance(workers, Threads):
            return ChunkWork(await self._tokenizers.get(task.files), options, TRAINING_DATE).run
        return partial(run_chunk, Task(await self._tokenizers.folder(task.files), options, TRAINING_DATE))

    async def _works(
        self, sha256: str, do: Callable[[Chunk], ChunkResult]
    ) -> AsyncIterator[Work[ChunkResult]]:
        async for lines in self._chunks(sha256):
            yield chunk_of_work(do, lines)

    async def _chunks(self, sha256: str) -> AsyncIterator[Chunk]:
        """Of a stored file. Raises DataLoss at its end if it is not what was stored."""
        chunker = Chunker()

        def take(data: bytes) -> list[Chunk]:
            return list(chunker.feed(data))

        async for data in blob_chunks(self._objects, sha256, 256 * 1024):
            for lines in await asyncio.to_thread(take, data):
                yield lines
        for lines in chunker.finish():
            yield lines

    async def _compare(self, task: AuditTask, files: AuditFiles) -> Outcome:
        """What a training and a validation file both hold. Raises NotFound if one of their audits is gone."""
        paths = []
        for key in task.compared or ():
            audit = await self._store.get_audit(key, task.now)
            if audit is None or not audit.tokens_key:
                raise NotFound(f"The audit {key} is not there any more.")
            path = files.tokens.with_name(f"{key}.arrow")
            await fetch_blob(self._objects, audit.result.sha256, path)
            paths.append(path)
        size = await asyncio.to_thread(lambda: sum(path.stat().st_size for path in paths))
        async with self._workers_for(size, 1) as workers:
            await _search(workers, files, *paths)
        return await asyncio.to_thread(_compared, files, {"key": task.key, "text": VERSION})


@dataclass(frozen=True, slots=True)
class AuditFiles:
    """Where an audit writes before it stores."""

    tokens: Path
    duplicates: Path
    findings: Path


def chunk_of_work(do: Callable[[Chunk], ChunkResult], lines: Chunk) -> Work[ChunkResult]:
    """A chunk as work that may be done line by line."""

    def parts() -> Parts[ChunkResult]:
        works = [Work(partial(do, [line]), f"line {line.number}") for line in lines]
        return Parts(works, partial(joined, lines))

    return Work(partial(do, lines), f"the lines from {lines[0].number} on", parts)


async def _search(workers: Workers, files: AuditFiles, *objects: Path) -> None:
    """Write the duplicates within a token object, or between two."""
    with local_disk(files.duplicates):
        work = Work(partial(write_duplicates, files.duplicates, *objects), "the search for duplicates")
        await workers.result(work)


def _concluded(collector: Collector, files: AuditFiles, metadata: Mapping[str, str]) -> Outcome:
    with local_disk(files.findings):
        outcome = collector.conclude(read_duplicates(files.duplicates))
        collector.found.write(files.findings, metadata)
    tokens, findings = file_sha256(files.tokens), file_sha256(files.findings)
    return replace(outcome, result=replace(outcome.result, sha256=tokens, findings_sha256=findings))


def _compared(files: AuditFiles, metadata: Mapping[str, str]) -> Outcome:
    tally, found = Tally(), FindingLines()
    with local_disk(files.findings):
        for item in read_duplicates(files.duplicates):
            finding = overlap_finding(item)
            tally.add(finding)
            found.add(finding.code, (finding.line,))
        found.write(files.findings, metadata)
    return Outcome(AuditResult(findings_sha256=file_sha256(files.findings)), report_of(0, tally))
