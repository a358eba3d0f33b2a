"""Rows that are longer than a limit of tokens, made shorter where nothing is torn apart.

drop_oldest: a conversation loses its oldest exchanges, after the system message it begins with: what is left begins
with a turn of the user and has the last trained answer. A prompt loses its beginning, and so does a text.
cut_end: a conversation loses its last turns and ends with a trained answer. A completion loses its end, and so does a
text. An answer with a verdict is never cut: the verdict is on the whole of it.
drop_row: no row is made shorter.

Texts are cut between tokens. What is left is tokenised anew and kept only if it fits, so that a shortened row is within
the limit whatever a template or a tokenizer does. It is the longest such row, but for templates that write more for
fewer turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from msgspec.structs import replace

from lathe.text.chat import Chat
from lathe.text.errors import RowError
from lathe.text.formats import RowFormat
from lathe.text.parts import Part, Plain, TrainingRow
from lathe.text.render import RenderOptions, render_whole
from lathe.text.tokenizer import Tokenizer

_SYSTEM = ("system", "developer")
_JUDGED = (RowFormat.PREFERENCE, RowFormat.UNPAIRED_PREFERENCE)


class Policy(StrEnum):
    """Which end of a row that is too long goes; see the module."""

    DROP_OLDEST = "drop_oldest"
    CUT_END = "cut_end"
    DROP_ROW = "drop_row"


@dataclass(frozen=True, slots=True)
class Cuts:
    """The ways to make a row shorter. make(n), for n from 1 to count: the row, shorter with each n. guess: those before
    it are not worth trying."""

    count: int
    make: Callable[[int], TrainingRow]
    guess: int = 1


def excess_tokens(tokenizer: Tokenizer, row: TrainingRow, options: RenderOptions, now: datetime) -> int:
    """By how many tokens the longest sequence of a row is over the limit; 0 or less where all fit. now: what a template
    that writes the date reads. Raises RowError for a row that cannot be rendered."""
    wholes = render_whole(tokenizer, [part.content for part in row.parts], options, now=now)
    sizes = []
    for whole in wholes:
        if isinstance(whole, RowError):
            raise whole
        sizes.append(len(whole.tokens))
    return max(sizes) - options.context_limit


def shorten(
    tokenizer: Tokenizer,
    row: TrainingRow,
    options: RenderOptions,
    policy: Policy,
    *,
    excess: int,
    now: datetime,
) -> TrainingRow | None:
    """A row that is over the limit by `excess` tokens, within it; None where the policy has no way to that."""
    cuts = _cuts(tokenizer, row, policy, excess)

    def fits(number: int) -> bool:
        made = cuts.make(number)
        if any(isinstance(part.content, Plain) and not part.content.completion for part in made.parts):
            return False
        try:
            return excess_tokens(tokenizer, made, options, now) <= 0
        except RowError:
            # A template that refuses what is left.
            return False

    number = _first(cuts, fits)
    return None if number is None else cuts.make(number)


def _first(cuts: Cuts, fits: Callable[[int], bool]) -> int | None:
    """The first cut that fits: by steps that double, then by halving. What it gives was tried."""
    if not cuts.count:
        return None
    number, step = min(cuts.guess, cuts.count), 1
    below = number - 1
    while not fits(number):
        if number == cuts.count:
            return None
        below, number, step = number, min(number + step, cuts.count), 2 * step
    while number - below > 1:
        middle = (number + below) // 2
        if fits(middle):
            number = middle
        else:
            below = middle
    return number


def _cuts(tokenizer: Tokenizer, row: TrainingRow, policy: Policy, excess: int) -> Cuts:
    content = row.parts[0].content
    if policy is Policy.DROP_ROW or (policy is Policy.CUT_END and row.format in _JUDGED):
        return Cuts(0, lambda _: row)
    if isinstance(content, Chat):
        return (
            _without_oldest(row, content) if policy is Policy.DROP_OLDEST else _without_newest(row, content)
        )
    if policy is Policy.CUT_END:
        return _text_end(tokenizer, row, content, excess)
    if row.format is RowFormat.TEXT:
        return _text_beginning(tokenizer, row, "completion", content.completion, excess)
    return _text_beginning(tokenizer, row, "prompt", content.prompt, excess)


def _without_oldest(row: TrainingRow, chat: Chat) -> Cuts:
    """By whole exchanges: from the user's turns that begin one, up to the last that is answered."""
    roles = [message["role"] for message in chat.messages]
    head = next((place for place, role in enumerate(roles) if role not in _SYSTEM), len(roles))
    last = max((place for place, weight in enumerate(chat.weights) if weight), default=0)
    begins = [
        place for place in range(head + 1, last) if roles[place] == "user" and roles[place - 1] != "user"
    ]

    def kept(chat: Chat, begin: int) -> Chat:
        return _with_turns(chat, [*range(head), *range(begin, len(chat.messages))])

    return Cuts(len(begins), lambda number: _each_chat(row, lambda chat: kept(chat, begins[number - 1])))


def _without_newest(row: TrainingRow, chat: Chat) -> Cuts:
    """Down to a trained answer."""
    ends = [
        place + 1 for place, weight in enumerate(chat.weights) if weight and place + 1 < len(chat.messages)
    ]
    ends.reverse()
    return Cuts(
        len(ends),
        lambda number: _each_chat(row, lambda chat: _with_turns(chat, range(ends[number - 1]))),
    )


def _with_turns(chat: Chat, places: range | list[int]) -> Chat:
    return replace(
        chat,
        messages=tuple(chat.messages[place] for place in places),
        weights=tuple(chat.weights[place] for place in places),
    )


def _text_beginning(tokenizer: Tokenizer, row: TrainingRow, key: str, text: str, excess: int) -> Cuts:
    """Without its first tokens, at least one is left."""
    starts, _ = tokenizer.offsets(text)
    return Cuts(
        max(len(starts) - 1, 0), lambda number: _each_text(row, {key: text[starts[number] :]}), excess
    )


def _text_end(tokenizer: Tokenizer, row: TrainingRow, content: Plain, excess: int) -> Cuts:
    """Without the last tokens of what is trained, at least one is left."""
    text = content.completion
    _, ends = tokenizer.offsets(text)
    return Cuts(
        max(len(ends) - 1, 0),
        lambda number: _each_text(row, {"completion": text[: ends[-1 - number]]}),
        excess,
    )


def _each_chat(row: TrainingRow, change: Callable[[Chat], Chat]) -> TrainingRow:
    return replace(row, parts=tuple(Part(part.role, change(_chat(part))) for part in row.parts))


def _each_text(row: TrainingRow, changes: dict[str, str]) -> TrainingRow:
    return replace(row, parts=tuple(Part(part.role, replace(part.content, **changes)) for part in row.parts))


def _chat(part: Part) -> Chat:
    assert isinstance(part.content, Chat)
    return part.content
