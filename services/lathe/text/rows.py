"""A line of a training file in any of its formats (see `RowFormat`), as the texts that a model reads.

Chat rows train the assistant's turns of weight 1. In the formats with a verdict the prompt is never trained and the
output always is, so a `weight` there is refused. An output is one turn of the assistant: the whole
`preferred_output`, the last of the `messages` beside a `label`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from lathe.text.chat import (
    CHAT_KEYS,
    Chat,
    Message,
    parse_chat,
    parse_parallel_tool_calls,
    parse_tools,
    parse_turns,
)
from lathe.text.decoding import decode_json, type_name
from lathe.text.errors import RowError
from lathe.text.formats import Role, RowFormat

_PREFERRED = ("preferred_output", "preferred_completion")
_NON_PREFERRED = ("non_preferred_output", "non_preferred_completion")
_PREFERENCE_KEYS = frozenset({"input", *_PREFERRED, *_NON_PREFERRED})
_PROMPTED_KEYS = frozenset({"prompt", "completion"})
_TOOL_KEYS = CHAT_KEYS - {"messages"}


class Plain(Struct, frozen=True):
    """A text outside any chat template: only `completion` is trained. prompt is empty for plain text."""

    prompt: str
    completion: str


class Part(Struct, frozen=True):
    """One sequence of a row."""

    role: Role
    content: Chat | Plain


class TrainingRow(Struct, frozen=True):
    """parts: one; of a preference row two, the chosen and the rejected one, with equal prompts."""

    format: RowFormat
    parts: tuple[Part, ...]


def parse_line(line: bytes) -> TrainingRow:
    """Parses one line of a training file, in the format that its keys say.

    Raises RowError, which names the field and the code.
    """
    data = decode_json(line)
    if not isinstance(data, dict):
        raise RowError("", "data_type", f"a line must be one JSON object, not {type_name(data)}")
    match format_of(data):
        case RowFormat.PREFERENCE:
            return TrainingRow(RowFormat.PREFERENCE, _pair(data))
        case RowFormat.UNPAIRED_PREFERENCE:
            return TrainingRow(RowFormat.UNPAIRED_PREFERENCE, (_judged(data),))
        case RowFormat.COMPLETION:
            _check_keys(data, _PROMPTED_KEYS | _TOOL_KEYS)
            return TrainingRow(RowFormat.COMPLETION, (Part(Role.EXAMPLE, _prompted(data)),))
        case RowFormat.TEXT:
            _check_keys(data, {"text"})
            return TrainingRow(RowFormat.TEXT, (Part(Role.EXAMPLE, Plain("", _text(data, "text"))),))
        case RowFormat.CHAT:
            return TrainingRow(RowFormat.CHAT, (Part(Role.EXAMPLE, parse_chat(data)),))


def format_of(row: Mapping[str, Any]) -> RowFormat:
    """What a row is by its keys, whether or not it is a good one; CHAT where nothing says more."""
    if "label" in row:
        return RowFormat.UNPAIRED_PREFERENCE
    if "messages" in row:
        return RowFormat.CHAT
    if row.keys() & _PREFERENCE_KEYS:
        return RowFormat.PREFERENCE
    if row.keys() & _PROMPTED_KEYS:
        return RowFormat.COMPLETION
    return RowFormat.TEXT if "text" in row else RowFormat.CHAT


def _pair(data: Mapping[str, Any]) -> tuple[Part, Part]:
    _check_keys(data, _PREFERENCE_KEYS)
    given = data.get("input")
    if not isinstance(given, dict):
        raise RowError("input", "missing_input", f"must be an object with messages, not {type_name(given)}")
    _check_keys(given, CHAT_KEYS, "input.")
    prompt = _unweighted(given.get("messages"), "input.messages")
    _check_prompt(prompt, "input.messages")
    chosen, rejected = _output(data, _PREFERRED), _output(data, _NON_PREFERRED)
    if chosen == rejected:
        raise RowError("non_preferred_output", "identical_outputs", "is the same as preferred_output")
    return (
        Part(Role.CHOSEN, _answered(prompt, [chosen], given, "input.")),
        Part(Role.REJECTED, _answered(prompt, [rejected], given, "input.")),
    )


def _output(data: Mapping[str, Any], names: tuple[str, str]) -> Message:
    """The one turn of an output, under either of its names."""
    given = [name for name in names if data.get(name) is not None]
    if len(given) != 1:
        cause = f"give {names[0]} or {names[1]}, not both" if given else f"the row has no {names[0]}"
        raise RowError(given[-1] if given else names[0], "missing_output", cause)
    turns = _unweighted(data[given[0]], given[0])
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowError(given[0], "invalid_output", "must be a list of one message of the assistant")
    return turns[0]


def _judged(data: Mapping[str, Any]) -> Part:
    """An answer and whether it is a good one."""
    label = data["label"]
    if not isinstance(label, bool):
        raise RowError("label", "invalid_label", f"must be true or false, not {type_name(label)}")
    role = Role.DESIRABLE if label else Role.UNDESIRABLE
    if "messages" not in data and data.keys() & _PROMPTED_KEYS:
        _check_keys(data, {"label", *_PROMPTED_KEYS, *_TOOL_KEYS})
        return Part(role, _prompted(data))
    _check_keys(data, {"label", *CHAT_KEYS})
    messages = _unweighted(data.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "messages", "example_missing_assistant_message", "the last message must be the assistant's"
        )
    _check_prompt(messages[:-1], "messages")
    return Part(role, _answered(messages[:-1], messages[-1:], data, ""))


def _prompted(data: Mapping[str, Any]) -> Chat | Plain:
    """`prompt` and `completion`: two texts, or two lists of messages."""
    if not isinstance(data.get("prompt"), list):
        for key in data.keys() & _TOOL_KEYS:
            raise RowError(key, "invalid_tools", "only a prompt that is a list of messages can have tools")
        return Plain(_text(data, "prompt", optional=True), _text(data, "completion"))
    prompt = _unweighted(data["prompt"], "prompt")
    _check_prompt(prompt, "prompt")
    answer = _unweighted(data.get("completion"), "completion")
    if [turn["role"] for turn in answer] != ["assistant"]:
        raise RowError("completion", "invalid_output", "must be a list of one message of the assistant")
    return _answered(prompt, answer, data, "")


def _answered(prompt: list[Message], answer: list[Message], data: Mapping[str, Any], prefix: str) -> Chat:
    """A conversation whose last turn alone is trained."""
    tools = parse_tools(data.get("tools"), data.get("functions"), prefix)
    parallel = parse_parallel_tool_calls(data.get("parallel_tool_calls"), prefix)
    return Chat((*prompt, *answer), tools, parallel, (0,) * len(prompt) + (1,))


def _unweighted(messages: object, path: str) -> list[Message]:
    parsed, _ = parse_turns(messages, path)
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if message.get("weight") is not None:
            raise RowError(
                f"{path}[{index}].weight",
                "invalid_weight",
                "only chat rows have weights; here exactly the output is trained",
            )
    return parsed


def _check_prompt(prompt: list[Message], path: str) -> None:
    if not prompt or prompt[-1]["role"] == "assistant":
        cause = "ends with the assistant's turn" if prompt else "is empty"
        raise RowError(
            path, "invalid_prompt", f"what the output answers {cause}; it must end with a message to answer"
        )


def _text(data: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    """The string under a key. An empty one only where it is optional."""
    value = data.get(key)
    if not isinstance(value, str):
        code = "data_type" if key in data else "message_missing_key"
        raise RowError(
            key, code, f"must be a string, not {type_name(value)}" if key in data else "is missing"
        )
    if not value and not optional:
        raise RowError(key, "missing_content", "the text is empty")
    return value


def _check_keys(data: Mapping[str, Any], allowed: Collection[str], prefix: str = "") -> None:
    for key in data:
        if key not in allowed:
            known = ", ".join(sorted(allowed))
            raise RowError(f"{prefix}{key}", "message_unrecognized_key", f"unknown key; known here: {known}")
