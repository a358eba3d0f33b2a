"""Where the trained turns of a rendered text lie among its ids, found without offsets (which cost the tokenizer a fifth
more time, and Python as much again). Pure.

Text is split at added tokens before all else, so the added tokens of a text and those among its ids correspond one to
one, in order; with them as marks the rest is comparing ids. Whatever cannot be told for sure is left to the offsets.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lathe.text.mask import Rendered, Span

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Marks:
    """The added tokens of a text, in order: their indexes among the ids, and the characters they begin and end at."""

    indexes: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def find_marks(text: str, ids: Sequence[int], contents: Mapping[int, str]) -> Marks | None:
    """None where text and ids do not have the same added tokens. contents: id -> text of every added token."""
    # No Python instruction for each token.
    added = list(filter(contents.__contains__, ids))
    if not added:
        return Marks((), (), ())
    present = {contents[token]: token for token in added}
    matches = list(_pattern(frozenset(present)).finditer(text))
    if [present[match[0]] for match in matches] != added:
        return None
    indexes: list[int] = []
    for token in added:
        indexes.append(ids.index(token, indexes[-1] + 1 if indexes else 0))
    starts, ends = (tuple(place(match) for match in matches) for place in (re.Match.start, re.Match.end))
    return Marks(tuple(indexes), starts, ends)


@lru_cache(maxsize=64)
def _pattern(contents: frozenset[str]) -> re.Pattern[str]:
    """Any of the texts, the longest that fits, as the tokenizer matches them."""
    return re.compile("|".join(re.escape(text) for text in sorted(contents, key=lambda t: (-len(t), t))))


def aligned_ranges(
    item: Rendered,
    ids: Sequence[int],
    contents: Mapping[int, str],
    stops: frozenset[int],
    encode: Callable[[str], Sequence[int]],
) -> list[Range] | None:
    """Half-open token ranges of the spans, as `trained_range` gives them where every edge is stable.

    encode: the ids of a short text alone. None where that cannot be told, or an edge is not stable.
    """
    if item.document:
        (span,) = item.spans
        start = _alone(item.text[: span.start], ids, 0, encode)
        return None if start is None else [(start, len(ids))]
    marks = find_marks(item.text, ids, contents)
    if marks is None or not stops <= contents.keys():
        return None
    ranges: list[Range] = []
    for span in item.spans:
        start = _start(item.text, span, ids, marks, encode)
        end = None if start is None else _end(span, start, ids, marks, stops)
        if start is None or end is None:
            return None
        ranges.append((start, end))
    return ranges


def _start(
    text: str, span: Span, ids: Sequence[int], marks: Marks, encode: Callable[[str], Sequence[int]]
) -> int | None:
    """The first token of the turn; compared is only what lies between it and the mark before it."""
    if not span.follows_prompt:
        return None
    before = bisect_left(marks.starts, span.start) - 1
    if before < 0:
        return _alone(text[: span.start], ids, 0, encode)
    if marks.ends[before] > span.start:
        return None
    return _alone(text[marks.starts[before] : span.start], ids, marks.indexes[before], encode)


def _end(span: Span, start: int, ids: Sequence[int], marks: Marks, stops: frozenset[int]) -> int | None:
    """Behind the first token that ends a turn, within the span."""
    for place in range(bisect_left(marks.indexes, start), len(marks.indexes)):
        if marks.starts[place] >= span.end:
            return None
        index = marks.indexes[place]
        if ids[index] in stops:
            return index + 1
    return None


def _alone(
    stretch: str, ids: Sequence[int], first: int, encode: Callable[[str], Sequence[int]]
) -> int | None:
    """The index behind the stretch's own ids, if they are how ids[first:] begins."""
    if not stretch:
        return first
    alone = encode(stretch)
    end = first + len(alone)
    return end if tuple(ids[first:end]) == tuple(alone) else None
