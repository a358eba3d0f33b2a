"""The audit beside the tokenizer alone: SmolLM2's tokenizer and template, one thread, CPU seconds.

The reference is the Rust tokenizer's own `encode_batch` (as users call it, with offsets) on texts that are rendered
already, in batches of the same rows. audit_vs_tokenizer: the ratio of the rates of parsing, rendering, tokenising,
masking and storing; audit_all_vs_tokenizer: with every finding, duplicates and statistics too. The median over the
rounds; one before them, which finds caches and memory empty, is not measured.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from lathe.datasets.chunkwork import BATCH_ROWS, Chunker, ChunkWork
from lathe.datasets.collecting import Collector
from lathe.text.arrow import TokenRow, TokenWriter
from lathe.text.chat import Chat
from lathe.text.duplicates import read_duplicates, write_duplicates
from lathe.text.render import RenderOptions, prepare
from lathe.text.rows import parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.benchmarks.datasets.corpus import Setting, chat_lines
from tests.benchmarks.engine.model import base_folder

_ROWS = 3000
_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_OPTIONS = RenderOptions(context_limit=8192)


def measure(setting: Setting) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_folder(base_folder(setting.data))
    lines = list(islice(chat_lines(), _ROWS))
    texts = [_text(tokenizer, line) for line in lines]
    contenders: dict[str, Callable[[], object]] = {
        "tokenizer": lambda: _tokenizer_alone(tokenizer, texts),
        "audit": lambda: _stored(tokenizer, lines),
        "audit_all": lambda: _audited(tokenizer, lines),
    }
    # A process audits many files, and reads its model of languages once.
    for contender in contenders.values():
        contender()
    # What was loaded before is not looked through again and again.
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(setting.rounds):
        for name, contender in contenders.items():
            gc.collect()
            began = time.process_time()
            contender()
            seconds[name].append(time.process_time() - began)
    figures = {f"{name}_us_a_row": statistics.median(taken) / _ROWS * 1e6 for name, taken in seconds.items()}
    for name in ("audit", "audit_all"):
        pairs = zip(seconds["tokenizer"], seconds[name], strict=True)
        figures[f"{name}_vs_tokenizer"] = statistics.median(alone / ours for alone, ours in pairs)
    return figures


def _text(tokenizer: Tokenizer, line: bytes) -> str:
    (part,) = parse_line(line).parts
    assert isinstance(part.content, Chat)
    messages = prepare(part.content.messages, tokenizer.template)
    return tokenizer.template.render(messages, part.content.tools, now=_NOW)


def _tokenizer_alone(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    return sum(
        len(encoding)
        for begin in range(0, len(texts), BATCH_ROWS)
        for encoding in tokenizer.encode_spans(texts[begin : begin + BATCH_ROWS])
    )


def _stored(tokenizer: Tokenizer, lines: Sequence[bytes]) -> None:
    """What an engine needs, without what a user is told."""
    with tempfile.TemporaryDirectory() as folder, TokenWriter(Path(folder) / "tokens", {}) as writer:
        for begin in range(0, len(lines), BATCH_ROWS):
            rows = [parse_line(line) for line in lines[begin : begin + BATCH_ROWS]]
            for number, found in enumerate(tokenise_rows(tokenizer, rows, _OPTIONS, now=_NOW), begin + 1):
                assert isinstance(found, Tokenised)
                for role, example in found.sequences:
                    writer.write(TokenRow(example.tokens, example.mask, number, role))


def _audited(tokenizer: Tokenizer, lines: Sequence[bytes]) -> None:
    """The whole audit of the file, as the service makes it in one process."""
    chunker, work = Chunker(), ChunkWork(tokenizer, _OPTIONS, _NOW)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens"
        with TokenWriter(path, {}) as writer:
            collector = Collector(writer)
            for chunk in (*chunker.feed(b"".join(lines)), *chunker.finish()):
                collector.add(work.run(chunk))
        write_duplicates(Path(folder) / "duplicates", path)
        outcome = collector.conclude(read_duplicates(Path(folder) / "duplicates"))
        collector.found.write(Path(folder) / "findings", {})
    assert outcome.result.rows == len(lines) and not collector.has_errors
