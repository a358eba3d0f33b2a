"""Runs audits: one at a time, in a thread, restartable."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lathe.common.errors import DataLoss, LatheError, NotFound, RetryableError, Unavailable
from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.chunkwork import Chunker, ChunkWork
from lathe.datasets.collecting import Collector, Outcome, file_sha256, overlap_finding
from lathe.datasets.model import (
    AuditResult,
    AuditState,
    AuditTask,
    TokenizerFile,
    blob_key,
    report_of,
    whole_file,
)
from lathe.datasets.ports import DatasetStore
from lathe.datasets.service import render_options
from lathe.text import VERSION
from lathe.text.arrow import TokenWriter
from lathe.text.duplicates import find_duplicates, find_overlap
from lathe.text.findinglines import FindingLines
from lathe.text.findings import Tally
from lathe.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class TokenizerCache:
    """Tokenizers by the digests of their files: the last few in memory, all that were used in a folder."""

    def __init__(self, objects: ObjectStore, folder: Path, max_items: int = 2) -> None:
        self._objects = objects
        self._folder = folder / "tokenizers"
        self._max_items = max_items
        self._loaded: OrderedDict[str, Tokenizer] = OrderedDict()

    async def get(self, files: Sequence[TokenizerFile]) -> Tokenizer:
        """Raises NotFound if a file is gone, DataLoss if it is not what it was, Unavailable."""
        listed = sorted([file.path, file.sha256] for file in files)
        key = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        if key not in self._loaded:
            folder = await self._fetched(key, files)
            self._loaded[key] = await asyncio.to_thread(Tokenizer.from_folder, folder)
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._max_items:
            self._loaded.popitem(last=False)
        return self._loaded[key]

    async def _fetched(self, key: str, files: Sequence[TokenizerFile]) -> Path:
        target = self._folder / key
        if await asyncio.to_thread(target.is_dir):
            return target
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=self._folder) as temporary:
            made = Path(temporary) / "files"
            for file in files:
                path = made / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                await self._objects.fetch(file.object_key, path)
                if await asyncio.to_thread(file_sha256, path) != file.sha256:
                    raise DataLoss(f"The stored {file.path} of the tokenizer does not match its digest.")
            if not target.is_dir():
                made.rename(target)
        return target


class Auditor:
    """Makes the token objects of RUNNING audits. It can die anywhere: the audit stays RUNNING and is made again,
    to the same bytes."""

    def __init__(self, store: DatasetStore, objects: ObjectStore, folder: Path) -> None:
        self._store = store
        self._objects = objects
        self._tokenizers = TokenizerCache(objects, folder)
        self._work = folder / "audits"

    async def start(self) -> None:
        """Forget what failed through Lathe's own fault (this process may be a mended one), and what a process that
        was killed left half-written."""
        await asyncio.to_thread(shutil.rmtree, self._work, ignore_errors=True)
        await self._store.forget_failed_audits()

    async def step(self) -> None:
        """Run all audits there are now, one after another. Raises Unavailable if one of them has to wait."""
        waiting: RetryableError | None = None
        for task in await self._store.running_audits():
            try:
                await self.run(task)
            except RetryableError as error:
                waiting = error
        if waiting is not None:
            raise waiting

    async def run(self, task: AuditTask) -> None:
        """RUNNING -> READY or ERROR. Raises Unavailable while something is away."""
        await asyncio.to_thread(self._work.mkdir, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="audit-", dir=self._work) as temporary:
            files = AuditFiles(Path(temporary) / "tokens.arrow", Path(temporary) / "findings.arrow")
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
                report = whole_file("server_error", f"The audit failed: {words}")
                await self._store.finish_audit(task.key, AuditState.FAILED, report, AuditResult())
                return
            await self._keep(task, outcome, files)

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
        """Write the token object and the findings; a result without token object if a row cannot be trained on."""
        tokenizer = await self._tokenizers.get(task.files)
        options = render_options(task.options)
        metadata = {
            "key": task.key,
            "text": VERSION,
            "dataset": task.dataset_sha256,
            "tokenizer": task.tokenizer_digest,
            "template": task.template_digest,
            "options": options.canonical(),
        }
        work = ChunkWork(tokenizer, options, task.now)
        with TokenWriter(files.tokens, metadata) as writer:
            collector = Collector(writer)
            chunker = Chunker()

            def take(data: bytes) -> None:
                for lines in chunker.feed(data):
                    collector.add(work.run(lines))

            def rest() -> None:
                for lines in chunker.finish():
                    collector.add(work.run(lines))

            # Each chunk in a thread of its own turn: the event loop stays free between and during them.
            async for data in self._objects.stream(blob_key(task.dataset_sha256), chunk_size=256 * 1024):
                await asyncio.to_thread(take, data)
            await asyncio.to_thread(rest)
        return await asyncio.to_thread(_concluded, collector, files, metadata)

    async def _compare(self, task: AuditTask, files: AuditFiles) -> Outcome:
        """What a training and a validation file both hold. Raises NotFound if one of their audits is gone."""
        paths = []
        for key in task.compared or ():
            audit = await self._store.get_audit(key, task.now)
            if audit is None or not audit.object_key:
                raise NotFound(f"The audit {key} is not there any more.")
            path = files.tokens.with_name(f"{key}.arrow")
            await self._objects.fetch(audit.object_key, path)
            paths.append(path)
        return await asyncio.to_thread(_compared, paths, files, {"key": task.key, "text": VERSION})


@dataclass(frozen=True, slots=True)
class AuditFiles:
    """Where an audit writes before it stores."""

    tokens: Path
    findings: Path


def _concluded(collector: Collector, files: AuditFiles, metadata: Mapping[str, str]) -> Outcome:
    outcome = collector.conclude(find_duplicates(files.tokens))
    collector.found.write(files.findings, metadata)
    digests = (
        "" if collector.has_errors else file_sha256(files.tokens),
        file_sha256(files.findings),
    )
    return replace(outcome, result=replace(outcome.result, sha256=digests[0], findings_sha256=digests[1]))


def _compared(paths: Sequence[Path], files: AuditFiles, metadata: Mapping[str, str]) -> Outcome:
    training, validation = paths
    tally, found = Tally(), FindingLines()
    for item in find_overlap(training, validation):
        finding = overlap_finding(item)
        tally.add(finding)
        found.add(finding.code, (finding.line,))
    found.write(files.findings, metadata)
    return Outcome(AuditResult(findings_sha256=file_sha256(files.findings)), report_of(0, tally))
