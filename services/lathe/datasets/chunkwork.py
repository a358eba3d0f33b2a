"""Some lines of a dataset as what an audit keeps of them. Pure: whoever does a chunk, and how often, the result is the
same."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from lathe.text.errors import RowError
from lathe.text.findings import Finding
from lathe.text.formats import Role, RowFormat
from lathe.text.jsonl import Line, LineSplitter
from lathe.text.render import Example, RenderOptions
from lathe.text.rowchecks import TRAINED_RUNS, RowChecks, answer_of, language_of_row, turns_of
from lathe.text.rows import TrainingRow, parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer

# Tokenised together, whichever comes first: enough for the tokenizer's own threads, little enough to keep memory flat
# (measured: some 700 bytes a token at the peak). A line is tokenised whole, so that a long one may still take more.
BATCH_ROWS = 64
BATCH_BYTES = 1 << 20
Chunk = Sequence[Line]
# Longer answers are no labels.
_LABEL_CHARACTERS = 40
_OTHER = ""


@dataclass(slots=True)
class ChunkResult:
    """What a chunk's rows became. tokens, mask: of all sequences, joined; sizes, lines, roles: of each sequence.

    row_lines, languages: of each good row. examples: how many good rows; rows: how many a batch counts them as.
    labels: short answers; all longer ones count under the empty text. counts: by quantity, value -> how often.
    """

    format: RowFormat | None = None
    findings: list[Finding] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("i"))
    mask: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)
    row_lines: list[int] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    examples: int = 0
    rows: int = 0
    truncated: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[int]] = field(default_factory=dict)


class Chunker:
    """Cuts a file that comes in pieces into chunks of lines, always at the same places."""

    def __init__(self) -> None:
        self._splitter = LineSplitter()
        self._lines: list[Line] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that these bytes complete."""
        for line in self._splitter.feed(data):
            yield from self._take(line)

    def finish(self) -> Iterator[Chunk]:
        """The rest."""
        for line in self._splitter.finish():
            yield from self._take(line)
        if self._lines:
            yield self._cut()

    def _take(self, line: Line) -> Iterator[Chunk]:
        self._lines.append(line)
        self._size += len(line.data)
        if len(self._lines) == BATCH_ROWS or self._size >= BATCH_BYTES:
            yield self._cut()

    def _cut(self) -> Chunk:
        lines, self._lines, self._size = self._lines, [], 0
        return lines


class ChunkWork:
    """Does chunks for one base model.

    now: what a template that writes the date reads; the same for all rows and for every repetition.
    """

    def __init__(self, tokenizer: Tokenizer, options: RenderOptions, now: datetime) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._now = now
        self._checks = RowChecks(tokenizer)

    def run(self, lines: Chunk) -> ChunkResult:
        """Parse, render, tokenise and check the rows of a chunk."""
        result = ChunkResult()
        parsed: list[tuple[int, TrainingRow]] = []
        for line in lines:
            try:
                parsed.append((line.number, _parse(line)))
            except RowError as error:
                _refuse(result, line.number, error)
        rows = [row for _, row in parsed]
        found = tokenise_rows(self._tokenizer, rows, self._options, now=self._now)
        for (number, row), one in zip(parsed, found, strict=True):
            result.format = row.format
            if isinstance(one, RowError):
                _refuse(result, number, one)
            else:
                self._keep(result, number, row, one)
        result.findings.sort(key=lambda finding: finding.line)
        return result

    def _keep(self, result: ChunkResult, line: int, row: TrainingRow, found: Tokenised) -> None:
        result.examples += 1
        result.rows += found.rows
        result.row_lines.append(line)
        result.languages.append(language_of_row(row))
        _label(result, row)
        _count(result, "turns", turns_of(row))
        for role, example in found.sequences:
            result.tokens += array("i", example.tokens)
            result.mask += example.mask
            result.sizes.append(len(example.tokens))
            result.lines.append(line)
            result.roles.append(role)
            _count_tokens(result, example)
        shortened = _shortened(line, row.format, found, self._options.context_limit)
        if shortened is not None:
            result.findings.append(shortened)
        result.truncated += bool(found.truncated)
        result.findings.extend(self._checks.check(line, row, found))


def joined(lines: Chunk, results: Sequence[ChunkResult | None]) -> ChunkResult:
    """The result of a chunk of those of its lines, each done alone; None is that of a row which no process survives."""
    whole = ChunkResult()
    for line, result in zip(lines, results, strict=True):
        if result is None:
            _refuse(
                whole,
                line.number,
                RowError(
                    "",
                    "row_too_heavy",
                    "no process that audited the row survived it: it takes too much memory, or the platform has too "
                    "little",
                ),
            )
            continue
        whole.format = result.format or whole.format
        whole.tokens += result.tokens
        whole.mask += result.mask
        for name in ("findings", "sizes", "lines", "roles", "row_lines", "languages"):
            getattr(whole, name).extend(getattr(result, name))
        whole.examples += result.examples
        whole.rows += result.rows
        whole.truncated += result.truncated
        whole.labels.update(result.labels)
        for quantity, counts in result.counts.items():
            whole.counts.setdefault(quantity, Counter()).update(counts)
    return whole


def _parse(line: Line) -> TrainingRow:
    if line.too_long:
        raise RowError("", "line_too_long", "the line is too long")
    return parse_line(line.data)


def _refuse(result: ChunkResult, line: int, error: RowError) -> None:
    result.findings.append(Finding(line, error.field, error.code, error.detail))


def _count(result: ChunkResult, quantity: str, value: int) -> None:
    counter = result.counts.get(quantity)
    if counter is None:
        counter = result.counts[quantity] = Counter()
    counter[value] += 1


def _count_tokens(result: ChunkResult, example: Example) -> None:
    runs = [run.end() - run.start() for run in TRAINED_RUNS.finditer(example.mask)]
    _count(result, "row_tokens", len(example.tokens))
    _count(result, "prompt_tokens", example.mask.index(1))
    _count(result, "completion_tokens", sum(runs))
    for size in runs:
        _count(result, "turn_tokens", size)


def _label(result: ChunkResult, row: TrainingRow) -> None:
    role = row.parts[0].role
    if role in (Role.DESIRABLE, Role.UNDESIRABLE):
        result.labels["true" if role is Role.DESIRABLE else "false"] += 1
        return
    answer = (answer_of(row) or "").strip()
    result.labels[answer if len(answer) <= _LABEL_CHARACTERS else _OTHER] += 1


def _shortened(line: int, found: RowFormat, row: Tokenised, limit: int) -> Finding | None:
    """What became of a row that is longer than the limit; None for any other."""
    if row.was_split:
        words = f"the text is longer than the limit of {limit} tokens; it was split into {row.rows} rows"
        return Finding(line, "", "split", words)
    cut = [(role, example) for role, example in row.sequences if example.truncated]
    if not cut:
        return None
    words = "; ".join(
        f"the {role.name.lower() + ' output' if len(row.sequences) > 1 else 'row'} has "
        f"{len(example.tokens) + example.truncated} tokens; the last {example.truncated} were cut at the limit of "
        f"{limit}"
        for role, example in cut
    )
    field_ = "messages" if found is RowFormat.CHAT else ""
    if any(example.lost for _, example in cut):
        return Finding(line, field_, "truncated", words)
    return Finding(line, field_, "tail_cut", words)
