"""What a training row is made of, and the checks that rows of every layout share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from lathe.text.chat import Chat, Message, parse_parallel_tool_calls, parse_row_tools, parse_turns
from lathe.text.decoding import type_name
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat


class Plain(Struct, frozen=True):
    """A text outside any chat template: only `completion` is trained. prompt is empty for plain text."""

    prompt: str
    completion: str


class Part(Struct, frozen=True):
    """One sequence of a row."""

    role: Role
    content: Chat | Plain


class TrainingRow(Struct, frozen=True):
    """One row, whatever it was written as.

    parts: one; of a preference row two, the chosen and the rejected one, with equal prompts; of a pair or triplet of
    texts one each. layout: how the row is written. extra: what a row of a format without a method says beside its
    parts (the free keys of a reinforcement row, the label or score of texts). unused: keys of the row that are not
    looked at.
    """

    format: RowFormat
    parts: tuple[Part, ...]
    layout: Layout = Layout.OPENAI
    extra: Mapping[str, Any] | None = None
    unused: tuple[str, ...] = ()


TOOL_KEYS = frozenset({"tools", "parallel_tool_calls", "functions"})
MEANINGFUL = frozenset(
    {"messages", "input", "preferred_output", "preferred_completion", "non_preferred_output",
     "non_preferred_completion", "prompt", "completion", "completions", "chosen", "rejected", "label", "labels", "text",
     "instruction", "output", "response", "context", "history", "system", "system_prompt", "conversations",
     "conversation", "question", "query", "answer", "weight", "chat_template_kwargs", "images", "image", "audio",
     "video", "videos", "kto_tag"}
) | TOOL_KEYS  # fmt: skip
"""Keys that say something in one layout or another: where they stand beside a layout that does not know them, somebody
meant something by them."""


def unused_keys(
    data: Mapping[str, Any], known: Collection[str], *, repeated: Collection[str] = ()
) -> tuple[str, ...]:
    """The keys beside those that the layout knows: an id, a source, a score. Raises RowError for one that would mean
    something in another layout, unless it is null or among those that only say the same again."""
    others = tuple(key for key in data if key not in known)
    for key in others:
        if key in MEANINGFUL and key not in repeated and data[key] is not None:
            raise unknown_key(key, known)
    return others


def check_keys(data: Mapping[str, Any], allowed: Collection[str], prefix: str = "") -> None:
    """Raises RowError for any other key, unless it is null."""
    for key, value in data.items():
        if key not in allowed and value is not None:
            raise unknown_key(f"{prefix}{key}", allowed)


def unknown_key(field: str, known: Collection[str]) -> RowError:
    return RowError(field, "message_unrecognized_key", f"unknown key; known here: {', '.join(sorted(known))}")


def text_of(data: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    """The string under a key. An empty one only where it is optional. Raises RowError."""
    value = data.get(key)
    if not isinstance(value, str):
        code = "data_type" if key in data else "message_missing_key"
        raise RowError(
            key, code, f"must be a string, not {type_name(value)}" if key in data else "is missing"
        )
    if not value and not optional:
        raise RowError(key, "missing_content", "the text is empty")
    return value


def unweighted(messages: object, path: str) -> list[Message]:
    """Messages of which exactly the output is trained. Raises RowError."""
    parsed, _ = parse_turns(messages, path)
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if message.get("weight") is not None:
            raise RowError(
                f"{path}[{index}].weight",
                "invalid_weight",
                "only chat rows have weights; here exactly the output is trained",
            )
    return parsed


def one_answer(messages: object, path: str) -> Message:
    """The one turn of an output. Raises RowError."""
    turns = unweighted(messages, path)
    check_answer(turns, path)
    return turns[0]


def check_answer(turns: list[Message], path: str) -> None:
    """Raises RowError unless there is one turn, and it is the assistant's."""
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowError(path, "invalid_output", "must be a list of one message of the assistant")


def check_prompt(prompt: list[Message], path: str) -> None:
    """Raises RowError unless there is something to answer."""
    if not prompt or prompt[-1]["role"] == "assistant":
        cause = "ends with the assistant's turn" if prompt else "is empty"
        raise RowError(
            path, "invalid_prompt", f"what the output answers {cause}; it must end with a message to answer"
        )


def answered(prompt: list[Message], answer: Message, data: Mapping[str, Any], prefix: str = "") -> Chat:
    """A conversation whose last turn alone is trained; its tools are those of `data`. Raises RowError."""
    tools = parse_row_tools(data, prefix)
    parallel = parse_parallel_tool_calls(data.get("parallel_tool_calls"), prefix)
    return Chat((*prompt, answer), tools, parallel, (0,) * len(prompt) + (1,))


def check_outcomes(data: Mapping[str, Any]) -> None:
    """Raises RowError unless there is something `chosen` and something `rejected`."""
    for name in ("chosen", "rejected"):
        if data.get(name) is None:
            raise RowError(name, "missing_output", f"the row has no {name}")


def check_different(chosen: object, rejected: object, names: tuple[str, str]) -> None:
    """Raises RowError for outputs that are the same."""
    if chosen == rejected:
        raise RowError(names[1], "identical_outputs", f"is the same as {names[0]}")


def pair(
    chosen: Chat | Plain, rejected: Chat | Plain, layout: Layout, unused: tuple[str, ...] = ()
) -> TrainingRow:
    """A preference row."""
    parts = (Part(Role.CHOSEN, chosen), Part(Role.REJECTED, rejected))
    return TrainingRow(RowFormat.PREFERENCE, parts, layout, None, unused)
