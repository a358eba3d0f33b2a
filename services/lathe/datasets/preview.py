"""Rows as the model sees them, read from what an audit stored."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lathe.common.objectstore.base import ObjectStore
from lathe.datasets.blobs import fetch_blob
from lathe.datasets.folders import work_folder
from lathe.datasets.model import Audit, AuditOptions, AuditState, TokenizerFile, invalid
from lathe.datasets.service import DatasetsService
from lathe.datasets.tokenizers import TokenizerCache
from lathe.text.arrow import TokenRow, read_lines
from lathe.text.findinglines import read_finding_lines
from lathe.text.findings import Severity, kind_of
from lathe.text.formats import Role
from lathe.text.tokenizer import Tokenizer

MAX_LINES = 20
# A token is some 15 bytes on the wire: both keep an answer below gRPC's 4 MiB.
MAX_TOKENS = 20_000
_MAX_SEQUENCES = 100
_KEPT = 4
# Beside the one that is read, which may be larger.
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class SequencePreview:
    """tokens: (id, text, whether it is trained) of the first ones."""

    line: int
    role: Role
    tokens: tuple[tuple[int, str, bool], ...]
    token_count: int
    trained_token_count: int


class Previews:
    """Reads stored token objects; the last few stay in a folder."""

    def __init__(
        self, service: DatasetsService, objects: ObjectStore, tokenizers: TokenizerCache, folder: Path
    ) -> None:
        self._service = service
        self._objects = objects
        self._tokenizers = tokenizers
        self._folder = folder / "previews"
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Remove what a process that was killed left, whole or not."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def preview(
        self, project: str, dataset_id: str, model: str, options: AuditOptions, lines: Sequence[int]
    ) -> tuple[Audit, list[SequencePreview]]:
        """The audit and, once it is done, the rows of these lines, as far as they fit into one answer; of a file with
        errors those that have none.

        Raises what `ensure_audit` raises, InvalidArgument for a line that is no row of the file, and DataLoss where the
        stored tokens are damaged.
        """
        if len(lines) > MAX_LINES:
            raise invalid("lines", f"lines has {len(lines)} numbers; at most {MAX_LINES} are shown at once.")
        audit = await self._service.ensure_audit(project, dataset_id, model, options, held_out=True)
        if not audit.tokens_key:
            return audit, []
        tokenizer = await self._tokenizers.get(await self._files(project, model))
        async with self._lock:
            path = await self._fetched(audit)
            rows = await asyncio.to_thread(read_lines, path, lines or None, _MAX_SEQUENCES)
        missing = set(lines) - {row.line for row in rows}
        if missing and audit.state is AuditState.ERROR:
            missing -= await self._refused(audit)
        if missing and len(rows) < _MAX_SEQUENCES:
            raise invalid("lines", f"line {min(missing)} is no row of the file.")
        return audit, await asyncio.to_thread(_previewed, tokenizer, rows)

    async def _refused(self, audit: Audit) -> set[int]:
        """The lines that have an error."""
        async with work_folder("findings-", self._folder) as folder:
            path = folder / "findings"
            await fetch_blob(self._objects, audit.result.findings_sha256, path)
            return await asyncio.to_thread(_error_lines, path)

    async def _files(self, project: str, model: str) -> Collection[TokenizerFile]:
        return (await self._service.base_models.resolve(project, model)).files

    async def _fetched(self, audit: Audit) -> Path:
        path = self._folder / f"{audit.result.sha256}.arrow"
        if not await asyncio.to_thread(path.is_file):
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            await fetch_blob(self._objects, audit.result.sha256, path)
        await asyncio.to_thread(_touch, path)
        return path


def _error_lines(path: Path) -> set[int]:
    return {line for line, code in read_finding_lines(path) if kind_of(code).severity is Severity.ERROR}


def _touch(path: Path) -> None:
    """Note that it was used, and remove the ones that were not for the longest time."""
    path.touch()
    files = sorted(path.parent.glob("*.arrow"), key=lambda file: file.stat().st_mtime, reverse=True)
    taken = 0
    for number, file in enumerate(files):
        taken += file.stat().st_size if number else 0
        if number >= _KEPT or taken > _KEPT_BYTES:
            file.unlink(missing_ok=True)


def _previewed(tokenizer: Tokenizer, rows: Sequence[TokenRow]) -> list[SequencePreview]:
    """Sequences until the tokens of one answer are spent."""
    found: list[SequencePreview] = []
    room = MAX_TOKENS
    for row in rows:
        if not room:
            break
        shown = list(islice(row.tokens, room))
        room -= len(shown)
        texts = token_texts(tokenizer, shown)
        tokens = tuple(zip(shown, texts, map(bool, row.mask), strict=False))
        found.append(SequencePreview(row.line, row.role, tokens, len(row.tokens), sum(row.mask)))
    return found


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; a character that several tokens make is the last one's. Bytes that are no
    character at the end show as U+FFFD."""
    decoder = tokenizer.stream_decoder(skip_special_tokens=False)
    texts = [decoder.push(id_) for id_ in ids]
    if texts:
        texts[-1] += decoder.flush()
    return texts
