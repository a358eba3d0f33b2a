"""Which characters of a rendered conversation the assistant writes, and which tokens those are. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tokenizers import Encoding

from lathe.text.errors import RowError, TemplateError
from lathe.text.template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

MAX_RENDERED_MESSAGES = 2_000_000
"""What may be rendered to find the trained turns of one row, in messages: each turn needs all that precede it, twice.
Some ten seconds; a conversation of which every other message is trained may have 2828."""


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open character span of one trained turn.

    follows_prompt: text[:start] is the prompt at inference. marked: a `{% generation %}` block told where it is.
    """

    start: int
    end: int
    message: int
    follows_prompt: bool
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """document: the text stands outside any chat; it is trained to its very end, its end of text included."""

    text: str
    spans: tuple[Span, ...]
    document: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """One tokenised stretch of a text.

    start: the character of the text at which it begins; base: the one that is the encoding's character 0
    (before `start` where the stretch was tokenised behind an anchor); skip: tokens of that anchor.
    """

    encoding: Encoding
    start: int
    base: int
    skip: int

    def ids(self) -> list[int]:
        return list(self.encoding.ids[self.skip :])

    def first_token(self, character: int, end: int) -> int:
        """Index (within ids()) of the first token that starts at `character` or after it, before `end`."""
        for place in range(character, end):
            token = self.encoding.char_to_token(place - self.base)
            if token is None:
                continue
            late = token_start(self.encoding, token) < character - self.base
            return int(token) + late - self.skip
        return len(self.encoding) - self.skip


@dataclass(frozen=True, slots=True)
class Source:
    """What is rendered: a row's messages, in the shape that templates read, at one moment. ends: the tokens that end a
    turn, as texts."""

    template: ChatTemplate
    messages: Messages
    tools: Tools
    weights: Sequence[int]
    now: datetime
    ends: Sequence[str] = ()

    def text(self, count: int, add_generation_prompt: bool = False) -> str:
        """The first `count` messages. Raises TemplateError."""
        part = self.messages[:count]
        return self.template.render(part, self.tools, add_generation_prompt, now=self.now)


def render_spans(source: Source) -> Rendered:
    """Renders once in full, and per trained turn its prompt (the messages before it, with the generation
    prompt) and the text through it: what lies between is what the assistant writes, its end of turn included.

    That needs both to be prefixes of the full text; of the latter what goes up to the end of the turn is enough
    (Phi-3 writes an end of text behind the last one). Some templates change earlier turns once later ones exist
    (they strip reasoning, or move the tools); for those the `{% generation %}` markers decide, where the
    template has them. Raises RowError: too_many_turns, template_error, or turn_not_maskable naming the message.
    """
    _check_turns(source.weights)
    try:
        text = source.text(len(source.messages))
    except TemplateError as error:
        raise RowError("messages", "template_error", f"the chat template refuses the row: {error}") from error
    spans: list[Span] = []
    for index, weight in enumerate(source.weights):
        if not weight:
            continue
        span = _prefix_span(source, index, text)
        if span is None:
            return _marked_spans(source, text, index)
        spans.append(span)
    return Rendered(text, tuple(spans))


def _check_turns(weights: Sequence[int]) -> None:
    turns = [index for index, weight in enumerate(weights) if weight]
    if sum(2 * index + 1 for index in turns) > MAX_RENDERED_MESSAGES:
        raise RowError(
            "messages",
            "too_many_turns",
            f"{len(turns)} of the row's {len(weights)} messages are trained turns, and finding their tokens takes "
            "longer than a row may; split the conversation, or give earlier turns weight 0",
        )


def _prefix_span(source: Source, index: int, text: str) -> Span | None:
    """None when the text up to this turn is not how the full text begins."""
    try:
        prompt = source.text(index, add_generation_prompt=True)
        if not text.startswith(prompt):
            return None
        last = index == len(source.messages) - 1
        through = text if last else source.text(index + 1)
    except TemplateError:
        return None  # a template may refuse the part of a conversation that it takes as a whole
    if not text.startswith(through):
        through = _to_its_end(through, len(prompt), source.ends)
    if not (text.startswith(through) and len(through) > len(prompt)):
        return None
    return Span(len(prompt), len(through), index, follows_prompt=True)


def _to_its_end(through: str, start: int, ends: Sequence[str]) -> str:
    """Up to the first end of a turn after `start`; nothing where there is none."""
    places = [(place, -len(end)) for end in ends if (place := through.find(end, start)) >= 0]
    place, size = min(places, default=(0, 0))
    return through[: place - size]


def _marked_spans(source: Source, text: str, failed: int) -> Rendered:
    turns = [index for index, message in enumerate(source.messages) if message["role"] == "assistant"]
    if source.template.has_generation_markers:
        try:
            marked, found = source.template.render_marked(source.messages, source.tools, now=source.now)
        except TemplateError as error:
            raise RowError(
                "messages", "template_error", f"the chat template refuses the row: {error}"
            ) from error
        if marked == text and len(found) == len(turns):
            pairs = [pair for pair in zip(turns, found, strict=True) if source.weights[pair[0]]]
            return Rendered(text, tuple(_marked_span(source, turn, text, place) for turn, place in pairs))
    raise RowError(f"messages[{failed}]", "turn_not_maskable", _why_not(source, failed))


def _why_not(source: Source, index: int) -> str:
    """What keeps a turn from being trained, and what helps."""
    if index == 0:
        return (
            "nothing precedes this turn, and this base model's chat template cannot begin a conversation with an "
            "answer, so that it cannot be told which tokens to train; give the message weight 0, or leave it out"
        )
    try:
        fits = source.text(index + 1).startswith(source.text(index, add_generation_prompt=True))
    except TemplateError:
        fits = True
    if not fits:
        return (
            "this base model's chat template opens an answer that is asked for in another way than one that is there, "
            "so that it cannot be told which tokens to train; correct the template, or choose another base model"
        )
    return (
        "this base model's chat template writes this turn, or what precedes it, in another way once other turns "
        "follow, so that it cannot be told which tokens to train; give the message weight 0, or split the row so that "
        "the turn is its last"
    )


def _marked_span(source: Source, turn: int, text: str, place: tuple[int, int]) -> Span:
    start, end = place
    try:
        follows = source.text(turn, add_generation_prompt=True) == text[:start]
    except TemplateError:
        follows = False
    return Span(start, end, turn, follows_prompt=follows, marked=True)


def token_start(encoding: Encoding, token: int) -> int:
    """The character at which a token begins."""
    characters = encoding.token_to_chars(token)
    return 0 if characters is None else int(characters[0])


def trained_range(
    pieces: Sequence[Piece], ids: Sequence[int], span: Span, size: int, stops: frozenset[int]
) -> tuple[int, int]:
    """Half-open token range of a span within `ids`, the pieces' ids joined; `size` is the text's length.

    The tokens that start in the span, up to and including the first that ends a turn. A stop token right
    behind the span (of a marker that leaves it out) is taken in.
    """
    start = _token_at(pieces, span.start, size)
    end = _token_at(pieces, span.end, size)
    for index in range(start, end):
        if ids[index] in stops:
            return start, index + 1
    if span.marked and end < len(ids) and ids[end] in stops:
        end += 1
    return start, end


def _token_at(pieces: Sequence[Piece], character: int, size: int) -> int:
    """The first token of all that starts at `character` or after it."""
    before = 0
    for index, piece in enumerate(pieces):
        end = pieces[index + 1].start if index + 1 < len(pieces) else size
        if character < end:
            return before + piece.first_token(character, end)
        before += len(piece.encoding) - piece.skip
    return before
