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
    """What every row of one training file is to a method, however it is written (see Layout).

    CHAT: a conversation. PREFERENCE: a prompt and two answers, the better one and the other. UNPAIRED_PREFERENCE: an
    answer with a verdict. COMPLETION: a prompt and its completion. TEXT: a text. REINFORCEMENT: a prompt and what a
    grader needs to know. PAIR, SCORED_PAIR, TRIPLET, LABELLED_TEXT: texts for an encoder. No method trains on the last
    five yet.
    """

    CHAT = "chat"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired_preference"
    COMPLETION = "completion"
    TEXT = "text"
    REINFORCEMENT = "reinforcement"
    PAIR = "pair"
    SCORED_PAIR = "scored_pair"
    TRIPLET = "triplet"
    LABELLED_TEXT = "labelled_text"


class Layout(StrEnum):
    """How rows are written: whose names they use. docs/data.md has a row of each."""

    OPENAI = "openai"
    TRL = "trl"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    SENTENCES = "sentences"


def described(found: RowFormat) -> str:
    """The format in words, for messages: "a chat row (messages)"."""
    return _WORDS[found]


_WORDS = {
    RowFormat.CHAT: "a chat row (messages)",
    RowFormat.PREFERENCE: "a preference row (input, preferred_output, non_preferred_output)",
    RowFormat.UNPAIRED_PREFERENCE: "an unpaired preference row (messages, or prompt and completion, with a label)",
    RowFormat.COMPLETION: "a completion row (prompt, completion)",
    RowFormat.TEXT: "a text row (text)",
    RowFormat.REINFORCEMENT: "a reinforcement row (a prompt without an answer, and keys for a grader)",
    RowFormat.PAIR: "a pair of texts (anchor, positive)",
    RowFormat.SCORED_PAIR: "a pair of texts with a score or label (sentence1, sentence2, score)",
    RowFormat.TRIPLET: "a triplet of texts (anchor, positive, negative)",
    RowFormat.LABELLED_TEXT: "a text with a label (text, label)",
}

METHOD_FORMATS: dict[str, tuple[RowFormat, ...]] = {
    "supervised": (RowFormat.CHAT, RowFormat.COMPLETION, RowFormat.TEXT),
    "dpo": (RowFormat.PREFERENCE,),
    "orpo": (RowFormat.PREFERENCE,),
    "kto": (RowFormat.UNPAIRED_PREFERENCE,),
}
"""Which files a method trains on."""
