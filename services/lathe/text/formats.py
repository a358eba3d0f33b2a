"""The formats that a training file may have, and what a sequence of tokens is to the method that trains on it."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Role(IntEnum):
    """What a token row is to its method; stored in the token object as its number, which never changes.

    EXAMPLE: learned as it is. CHOSEN and REJECTED: the two answers of one pair, which stand side by side in that
    order. DESIRABLE and UNDESIRABLE: an answer with a verdict of its own.
    """

    EXAMPLE = 0
    CHOSEN = 1
    REJECTED = 2
    DESIRABLE = 3
    UNDESIRABLE = 4


class RowFormat(StrEnum):
    """What every row of one training file is.

    CHAT: `messages`. PREFERENCE: `input`, `preferred_output`, `non_preferred_output`. UNPAIRED_PREFERENCE: `messages`,
    or `prompt` and `completion`, with a `label`. COMPLETION: `prompt` and `completion`. TEXT: `text`.
    """

    CHAT = "chat"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired_preference"
    COMPLETION = "completion"
    TEXT = "text"


def described(found: RowFormat) -> str:
    """The format in words, for messages: "a chat row (messages)"."""
    return _WORDS[found]


_WORDS = {
    RowFormat.CHAT: "a chat row (messages)",
    RowFormat.PREFERENCE: "a preference row (input, preferred_output, non_preferred_output)",
    RowFormat.UNPAIRED_PREFERENCE: "an unpaired preference row (messages, or prompt and completion, with a label)",
    RowFormat.COMPLETION: "a completion row (prompt, completion)",
    RowFormat.TEXT: "a text row (text)",
}

METHOD_FORMATS: dict[str, tuple[RowFormat, ...]] = {
    "supervised": (RowFormat.CHAT, RowFormat.COMPLETION, RowFormat.TEXT),
    "dpo": (RowFormat.PREFERENCE,),
    "orpo": (RowFormat.PREFERENCE,),
    "kto": (RowFormat.UNPAIRED_PREFERENCE,),
}
"""Which files a method trains on."""
