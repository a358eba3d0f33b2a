"""Rows as OpenAI's API takes them, and `messages` with a `label`.

Chat rows train the assistant's turns of weight 1. In the formats with a verdict the prompt is never trained and the
output always is, so a `weight` there is refused. An output is one turn of the assistant: the whole
`preferred_output`, the last of the `messages` beside a `label`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lathe.text.chat import CHAT_KEYS, Chat, Message, parse_chat, parse_parallel_tool_calls, parse_row_tools
from lathe.text.decoding import check_depth, type_name
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.parts import (
    Part,
    TrainingRow,
    answered,
    check_different,
    check_keys,
    check_prompt,
    one_answer,
    pair,
    unweighted,
)

PREFERRED = ("preferred_output", "preferred_completion")
NON_PREFERRED = ("non_preferred_output", "non_preferred_completion")
_PREFERENCE_KEYS = frozenset({"input", *PREFERRED, *NON_PREFERRED})


def chat_row(data: Mapping[str, Any]) -> TrainingRow:
    """`messages`. With free keys and nothing said by the assistant last, a prompt for reinforcement."""
    if not data.keys() <= CHAT_KEYS and _ends_with_a_question(data["messages"]):
        return _reinforcement(data)
    return TrainingRow(RowFormat.CHAT, (Part(Role.EXAMPLE, parse_chat(data)),))


def _ends_with_a_question(messages: object) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") not in (None, "assistant")


def _reinforcement(data: Mapping[str, Any]) -> TrainingRow:
    free = {key: value for key, value in data.items() if key not in CHAT_KEYS}
    return reinforcement(unweighted(data["messages"], "messages"), "messages", free, data, Layout.OPENAI)


def reinforcement(
    prompt: list[Message], path: str, free: Mapping[str, Any], data: Mapping[str, Any], layout: Layout
) -> TrainingRow:
    """A prompt that nobody has answered yet, and what a grader is told."""
    check_prompt(prompt, path)
    check_depth(free, "")
    tools = parse_row_tools(data)
    parallel = parse_parallel_tool_calls(data.get("parallel_tool_calls"))
    chat = Chat(tuple(prompt), tools, parallel, (0,) * len(prompt))
    return TrainingRow(RowFormat.REINFORCEMENT, (Part(Role.EXAMPLE, chat),), layout, free)


def preference_row(data: Mapping[str, Any]) -> TrainingRow:
    """`input`, `preferred_output`, `non_preferred_output`."""
    check_keys(data, _PREFERENCE_KEYS)
    given = data.get("input")
    if not isinstance(given, dict):
        raise RowError("input", "missing_input", f"must be an object with messages, not {type_name(given)}")
    check_keys(given, CHAT_KEYS, "input.")
    prompt = unweighted(given.get("messages"), "input.messages")
    check_prompt(prompt, "input.messages")
    chosen, rejected = _output(data, PREFERRED), _output(data, NON_PREFERRED)
    check_different(chosen, rejected, (PREFERRED[0], NON_PREFERRED[0]))
    return pair(
        answered(prompt, chosen, given, "input."), answered(prompt, rejected, given, "input."), Layout.OPENAI
    )


def _output(data: Mapping[str, Any], names: tuple[str, str]) -> Message:
    """The one turn of an output, under either of its names."""
    given = [name for name in names if data.get(name) is not None]
    if len(given) != 1:
        cause = f"give {names[0]} or {names[1]}, not both" if given else f"the row has no {names[0]}"
        raise RowError(given[-1] if given else names[0], "missing_output", cause)
    return one_answer(data[given[0]], given[0])


def labelled_messages_row(data: Mapping[str, Any]) -> TrainingRow:
    """`messages`, the last of them an answer, and whether it is a good one."""
    role = verdict(data)
    check_keys(data, {"label", *CHAT_KEYS})
    messages = unweighted(data.get("messages"), "messages")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "messages", "example_missing_assistant_message", "the last message must be the assistant's"
        )
    check_prompt(messages[:-1], "messages")
    part = Part(role, answered(messages[:-1], messages[-1], data))
    return TrainingRow(RowFormat.UNPAIRED_PREFERENCE, (part,))


def verdict(data: Mapping[str, Any]) -> Role:
    """What `label` says of an answer. Raises RowError."""
    label = data["label"]
    if not isinstance(label, bool):
        raise RowError("label", "invalid_label", f"must be true or false, not {type_name(label)}")
    return Role.DESIRABLE if label else Role.UNDESIRABLE
