"""The chunks of an audit put together: the token object, the report, the findings by line."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import merge
from itertools import accumulate, pairwise, repeat

from lathe.datasets.chunkwork import ChunkResult
from lathe.datasets.model import AuditResult, Distribution, Report, Share, Statistics, report_of
from lathe.text.arrow import TokenRow, TokenWriter
from lathe.text.duplicates import Duplicate
from lathe.text.findinglines import FindingLines
from lathe.text.findings import Finding, Tally
from lathe.text.formats import RowFormat
from lathe.text.language import UNKNOWN
from lathe.text.privacy import find_sensitive

# Answers are few when there are at most so many, and each stands in so many rows on average.
_FEW_ANSWERS = 50
_ROWS_PER_ANSWER = 5
_LEAST_ROWS = 50
_IMBALANCE = 0.9
_LANGUAGES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an audit made, and what it found. A report with errors says why nothing is trained from it."""

    result: AuditResult
    report: Report


class Collector:
    """Takes the chunks' results in the order of the file."""

    def __init__(self, writer: TokenWriter) -> None:
        self.found = FindingLines()
        self._writer = writer
        self._tally = Tally()
        self._format = RowFormat.CHAT
        self._examples = self._rows = self._tokens = self._trained = self._truncated = self._longest = 0
        self._counts: dict[str, Counter[int]] = {}
        self._labels: Counter[str] | None = Counter()
        self._languages: dict[str, array[int]] = {}

    @property
    def has_errors(self) -> bool:
        """Whether a row cannot be trained on."""
        return self._tally.has_errors

    def add(self, chunk: ChunkResult) -> None:
        """One more chunk: its rows are written, all else is counted."""
        self._format = chunk.format or self._format
        self._examples += chunk.examples
        self._rows += chunk.rows
        self._truncated += chunk.truncated
        self._tokens += len(chunk.tokens)
        self._trained += chunk.mask.count(1)
        self._longest = max(self._longest, *chunk.sizes, 0)
        places = pairwise(accumulate(chunk.sizes, initial=0))
        mask = bytes(chunk.mask)
        for (begin, end), line, role in zip(places, chunk.lines, chunk.roles, strict=True):
            self._writer.write(TokenRow(chunk.tokens[begin:end], mask[begin:end], line, role))
        for finding in chunk.findings:
            self._add(finding)
        for quantity, counts in chunk.counts.items():
            self._counts.setdefault(quantity, Counter()).update(counts)
        for line, language in zip(chunk.row_lines, chunk.languages, strict=True):
            self._languages.setdefault(language, array("q")).append(line)
        self._add_labels(chunk.labels)

    def conclude(self, duplicates: Iterable[Duplicate]) -> Outcome:
        """Call once, after the last chunk: what is known only of all rows is added. The result has no digests yet."""
        if not self._examples and not self.has_errors:
            self._add(Finding(0, "", "empty_file", "The file has no example."))
        for item in duplicates:
            self._add(duplicate_finding(item))
        for finding in other_languages(self._languages):
            self._add(finding)
        answers = few_answers(self._labels or {})
        imbalance = label_imbalance(answers)
        if imbalance is not None:
            self._add(imbalance)
        languages = Counter({name: len(lines) for name, lines in self._languages.items()})
        statistics = Statistics(
            **{quantity: distribution(counts) for quantity, counts in self._counts.items()},
            languages=shares(languages)[:_LANGUAGES_SHOWN],
            answers=answers,
        )
        report = report_of(self._examples, self._tally, self._format, statistics)
        result = AuditResult(
            rows=self._rows,
            tokens=self._tokens,
            trained_tokens=self._trained,
            truncated_rows=self._truncated,
            max_row_tokens=self._longest,
        )
        return Outcome(result, report)

    def _add(self, finding: Finding) -> None:
        self._tally.add(finding)
        self.found.add(finding.code, (finding.line,))

    def _add_labels(self, labels: Counter[str]) -> None:
        """Given up when there are too many to be labels."""
        if self._labels is None:
            return
        self._labels.update(labels)
        if len(self._labels) > _FEW_ANSWERS or self._labels[""]:
            self._labels = None


def duplicate_finding(item: Duplicate) -> Finding:
    """What is told of a row that repeats an earlier one of its file."""
    if item.exact:
        return Finding(item.line, "", "duplicate", f"the row is the same as line {item.of}")
    words = f"the row is nearly the same as line {item.of} (similarity {item.similarity:.2f})"
    return Finding(item.line, "", "near_duplicate", words)


def overlap_finding(item: Duplicate) -> Finding:
    """What is told of a training row that the validation file has too."""
    if item.exact:
        words = f"the row is the same as line {item.of} of the validation file"
        return Finding(item.line, "", "validation_duplicate", words)
    words = f"the row is nearly the same as line {item.of} of the validation file (similarity {item.similarity:.2f})"
    return Finding(item.line, "", "validation_near_duplicate", words)


def other_languages(lines: Mapping[str, array[int]]) -> Iterator[Finding]:
    """The rows in another language than more than half of those whose language is known, by line.

    lines: of each language, in order."""
    known = {language: found for language, found in lines.items() if language != UNKNOWN}
    main = max(known, key=lambda language: (len(known[language]), language), default="")
    if not main or 2 * len(known[main]) <= sum(map(len, known.values())):
        return
    others = [zip(found, repeat(name)) for name, found in known.items() if name != main]
    for line, name in merge(*others):
        yield Finding(line, "", "other_language", f"the row seems to be in {name}, most are in {main}")


def few_answers(labels: Mapping[str, int]) -> tuple[Share, ...]:
    """The answers where they are few, the most frequent first; of one that holds a secret or somebody's data only what
    that is."""
    rows = sum(labels.values())
    few = 0 < len(labels) <= min(_FEW_ANSWERS, rows // _ROWS_PER_ANSWER) and rows >= _LEAST_ROWS
    return tuple(Share(_shown(share.value), share.count) for share in shares(labels)) if few else ()


def _shown(answer: str) -> str:
    found = next(find_sensitive(answer), None)
    return answer if found is None else f"({found.what})"


def label_imbalance(answers: tuple[Share, ...]) -> Finding | None:
    """Said of the whole file when one of few answers is nearly all."""
    rows = sum(answer.count for answer in answers)
    if not rows or answers[0].count < _IMBALANCE * rows:
        return None
    part = f"{answers[0].count} of {rows} answers are {answers[0].value!r}"
    others = f"there are {len(answers)} different ones" if len(answers) > 1 else "there is no other one"
    return Finding(0, "", "label_imbalance", f"{part}; {others}")


def shares(counts: Mapping[str, int]) -> tuple[Share, ...]:
    """The most frequent first, then by name."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Share(value, count) for value, count in ordered)


def distribution(counts: Mapping[int, int]) -> Distribution:
    """counts: value -> how often. A quantile is the smallest value at or below which that share of them lies."""
    if not counts:
        return Distribution()
    values = sorted(counts)
    total = sum(counts.values())
    below = list(accumulate(counts[value] for value in values))

    def quantile(percent: int) -> int:
        return next(value for value, sum_ in zip(values, below, strict=True) if 100 * sum_ >= percent * total)

    mean = sum(value * count for value, count in counts.items()) / total
    return Distribution(
        total, values[0], quantile(10), quantile(50), round(mean, 2), quantile(90), quantile(99), values[-1]
    )
