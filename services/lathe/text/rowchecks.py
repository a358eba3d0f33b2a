"""What is found in one row beside what keeps it from being trained on: see `KINDS` for each code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from unicodedata import category

from lathe.text.chat import Chat, Message
from lathe.text.findings import Finding
from lathe.text.formats import RowFormat
from lathe.text.language import language_of
from lathe.text.privacy import find_sensitive
from lathe.text.probe import TemplateProbe
from lathe.text.render import Example
from lathe.text.rows import Plain, TrainingRow
from lathe.text.sequences import Tokenised
from lathe.text.tokenizer import Tokenizer

# An answer's trained tokens, the end of its turn among them.
_TINY_TOKENS = 2
_PATH_CHARS = 200
TRAINED_RUNS = re.compile(rb"\x01+")


class RowChecks:
    """Checks rows for one base model; keeps nothing of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(tokenizer.eos_ids)
        self._end = (tokenizer.eos_id is not None and tokenizer.token_of(tokenizer.eos_id)) or ""

    def check(self, line: int, row: TrainingRow, found: Tokenised) -> Iterator[Finding]:
        """All findings of a row; several of one code stand side by side."""
        for code, field, message in sorted(self._all(row, found), key=lambda item: item[0]):
            yield Finding(line, field, code, message)

    def _all(self, row: TrainingRow, found: Tokenised) -> Iterator[tuple[str, str, str]]:
        yield from self._tokens(row, found)
        content = row.parts[0].content
        if isinstance(content, Chat) and self._probe is not None:
            yield from self._template(row.format, content, self._probe)
        # A text that writes its own end gets no second one.
        end = self._end if isinstance(content, Plain) else ""
        for field, text in texts_of(row):
            yield from self._text(field, text if field == "prompt" else text.removesuffix(end))

    @cached_property
    def _probe(self) -> TemplateProbe | None:
        return TemplateProbe(self._tokenizer.template) if self._tokenizer.has_template else None

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        texts = sorted(self._tokenizer.special_texts, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    def _tokens(self, row: TrainingRow, found: Tokenised) -> Iterator[tuple[str, str, str]]:
        for part, (_, example) in zip(row.parts, found.sequences, strict=False):
            if row.format is RowFormat.TEXT:
                return
            runs = list(TRAINED_RUNS.finditer(example.mask))
            # The last turn of a row that was cut has lost its end: that is told already.
            whole = runs[:-1] if example.lost else runs
            if self._stop_is_missing(part.content, example, whole):
                yield "stop_not_trained", "", "the last trained token of a turn is none that ends a turn"
            answers = _answers(row.format, part.content)
            empty = next((field for field, text in answers if not _is_visible(text)), None)
            size = min((run.end() - run.start() for run in whole), default=_TINY_TOKENS + 1)
            if empty is not None:
                yield "empty_answer", empty, "the answer has no visible character"
            elif size <= _TINY_TOKENS:
                yield "tiny_answer", "", f"an answer has {size} trained tokens, its end included"

    def _stop_is_missing(
        self, content: Chat | Plain, example: Example, runs: Sequence[re.Match[bytes]]
    ) -> bool:
        if isinstance(content, Plain):
            return self._tokenizer.eos_id is None
        return any(example.tokens[run.end() - 1] not in self._stops for run in runs)

    def _template(self, found: RowFormat, chat: Chat, probe: TemplateProbe) -> Iterator[tuple[str, str, str]]:
        losses = probe.losses(chat)
        for index, key in losses.dropped:
            role = chat.messages[index]["role"]
            yield (
                "message_dropped",
                _place(found, index, "content" if key == "reasoning" else key),
                f"the template does not write the {key} of message {index + 1} ({role})",
            )
        for index in losses.reordered:
            role = chat.messages[index]["role"]
            yield (
                "messages_reordered",
                _place(found, index, ""),
                f"the template writes message {index + 1} ({role}) after a later one",
            )
        if losses.tools:
            count = len(chat.tools or ())
            yield "tools_not_rendered", "tools", f"the template writes none of the row's tools ({count})"

    def _text(self, field: str, text: str) -> Iterator[tuple[str, str, str]]:
        special = self._special.search(text) if self._special is not None else None
        if special is not None:
            token, place = special[0], special.start() + 1
            yield "special_token_in_text", field, f"character {place} begins the special token {token!r}"
        for item in find_sensitive(text):
            yield item.code, field, f"character {item.start + 1} begins what looks like {item.what}"


def texts_of(row: TrainingRow) -> Iterator[tuple[str, str]]:
    """(path, text) of all that a row says, tool calls' arguments and tools among it; of a pair the equal prompt
    once."""
    first = row.parts[0].content
    if isinstance(first, Chat):
        yield from _strings("tools", list(first.tools or ()))
    for index, message, field, text in _said(row):
        if text:
            yield field, text
        for number, call in enumerate(message.get("tool_calls") or ()):
            path = f"{_place(row.format, index, 'tool_calls')}[{number}].function.arguments"
            yield from _strings(path, call["function"]["arguments"])


def _said(row: TrainingRow) -> Iterator[tuple[int, Message, str, str]]:
    """(index, message, path, text) of what is said in a row; the message of a plain text is empty."""
    for number, part in enumerate(row.parts):
        content = part.content
        if isinstance(content, Plain):
            if not number and content.prompt:
                yield 0, {}, "prompt", content.prompt
            yield 0, {}, "text" if row.format is RowFormat.TEXT else "completion", content.completion
            continue
        begin = len(content.messages) - 1 if number else 0
        for index, message in enumerate(content.messages[begin:], begin):
            yield index, message, _place(row.format, index, "content"), message.get("content") or ""


def _strings(path: str, value: object) -> Iterator[tuple[str, str]]:
    """(path, text) of the strings in a value of JSON; the path is cut where keys make it long."""
    if isinstance(value, str) and value:
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(f"{path}.{key}"[:_PATH_CHARS], item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(f"{path}[{index}]", item)


def answer_of(row: TrainingRow) -> str | None:
    """What the row teaches to say: the last answer of its first sequence; None for plain texts and tool calls."""
    return None if row.format is RowFormat.TEXT else _answer(row.parts[0].content)


def language_of_row(row: TrainingRow) -> str:
    """Of the answer; of the last text before it where the answer says too little."""
    texts = [text for *_, text in _said(row) if text]
    found = (language_of(text) for text in reversed(texts[-3:]))
    return next((language for language in found if language != "und"), "und")


def turns_of(row: TrainingRow) -> int:
    """How many messages the row has; 1 for a text."""
    content = row.parts[0].content
    return len(content.messages) if isinstance(content, Chat) else 1


def _answer(content: Chat | Plain) -> str | None:
    if isinstance(content, Plain):
        return content.completion
    trained = [m for m, weight in zip(content.messages, content.weights, strict=True) if weight]
    if not trained or trained[-1].get("tool_calls"):
        return None
    return trained[-1].get("content") or ""


def _answers(found: RowFormat, content: Chat | Plain) -> Iterator[tuple[str, str]]:
    """(path, text) of each trained answer that is no call."""
    if isinstance(content, Plain):
        yield "completion", content.completion
        return
    for index, (message, weight) in enumerate(zip(content.messages, content.weights, strict=True)):
        if weight and not message.get("tool_calls"):
            yield _place(found, index, "content"), message.get("content") or ""


def _is_visible(text: str) -> bool:
    """Whether there is more than white space and characters without a shape, such as U+200B."""
    return any(not character.isspace() and category(character) not in ("Cc", "Cf") for character in text)


def _place(found: RowFormat, index: int, key: str) -> str:
    """The path of a message. In other formats than chat the message's number tells it: they have other keys."""
    if found is not RowFormat.CHAT:
        return f"message {index + 1}"
    return f"messages[{index}]" + (f".{key}" if key else "")
