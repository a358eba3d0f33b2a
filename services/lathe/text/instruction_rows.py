"""Conversations under other names: Alpaca's, ShareGPT's, questions with their answers. All become chat rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lathe.text.chat import Chat, Message, parse_tools, parse_turns
from lathe.text.decoding import decode_string, type_name
from lathe.text.errors import RowError
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.parts import (
    Part,
    TrainingRow,
    answered,
    check_different,
    check_outcomes,
    check_prompt,
    pair,
    text_of,
    unused_keys,
)

CONVERSATION_KEYS = ("conversations", "conversation")
QUESTION_KEYS = ("question", "query")
ANSWER_KEYS = ("answer", "response")
_SYSTEM_KEYS = ("system", "system_prompt")
_INPUT_KEYS = ("input", "context")
_OUTPUT_KEYS = ("output", "response")
_INSTRUCTION_KEYS = frozenset({"instruction", "history", *_INPUT_KEYS, *_SYSTEM_KEYS})

_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
    **dict.fromkeys(("observation", "tool", "function_response", "tool_response"), "tool"),
}


def alpaca_row(data: Mapping[str, Any]) -> TrainingRow:
    """`instruction`, `input` (or Dolly's `context`), `output` (or `response`); LLaMA-Factory's `system` and `history`.

    The user's message is the instruction and, after an empty line, the input.
    """
    # Stanford's own file, and sets made after it, repeat the row as one text.
    prompt, asked = data.get("prompt"), data.get("instruction")
    whole = isinstance(prompt, str) and isinstance(asked, str) and asked in prompt
    repeated = ("text", "prompt") if whole else ("text",)
    unused = unused_keys(data, {*_INSTRUCTION_KEYS, *_OUTPUT_KEYS}, repeated=repeated)
    return _chat(_instructed(data), text_of(data, _one_of(data, _OUTPUT_KEYS)), Layout.ALPACA, unused)


def _instructed(data: Mapping[str, Any]) -> list[Message]:
    """What an Alpaca row's output answers."""
    asked = text_of(data, "instruction")
    given = _optional(data, _INPUT_KEYS)
    question = f"{asked}\n\n{given}" if given else asked
    return [*_system(data), *_history(data.get("history")), {"role": "user", "content": question}]


def question_row(data: Mapping[str, Any]) -> TrainingRow:
    """`question` (or `query`; `prompt` beside `response`) and `answer` (or `response`), and optionally `system`."""
    asked, said = _one_of(data, (*QUESTION_KEYS, "prompt")), _one_of(data, ANSWER_KEYS)
    unused = unused_keys(data, {asked, said, *_SYSTEM_KEYS})
    return _chat(_questioned(data, asked), text_of(data, said), Layout.QUESTION_ANSWER, unused)


def _questioned(data: Mapping[str, Any], asked: str) -> list[Message]:
    """What the answer to the question under the key `asked` answers."""
    return [*_system(data), {"role": "user", "content": text_of(data, asked)}]


def compared_row(data: Mapping[str, Any]) -> TrainingRow:
    """Two answers as texts, `chosen` and `rejected`, to an Alpaca row's instruction or to a question."""
    instructed = data.get("instruction") is not None
    asked = "instruction" if instructed else _one_of(data, QUESTION_KEYS)
    known = _INSTRUCTION_KEYS if instructed else {asked, *_SYSTEM_KEYS}
    unused = unused_keys(data, {*known, "chosen", "rejected"})
    check_outcomes(data)
    chosen, rejected = (
        {"role": "assistant", "content": text_of(data, name)} for name in ("chosen", "rejected")
    )
    check_different(chosen, rejected, ("chosen", "rejected"))
    prompt = _instructed(data) if instructed else _questioned(data, asked)
    layout = Layout.ALPACA if instructed else Layout.QUESTION_ANSWER
    return pair(answered(prompt, chosen, {}), answered(prompt, rejected, {}), layout, unused)


def _chat(prompt: list[Message], answer: str, layout: Layout, unused: tuple[str, ...]) -> TrainingRow:
    messages = (*prompt, {"role": "assistant", "content": answer})
    weights = tuple(int(message["role"] == "assistant") for message in messages)
    part = Part(Role.EXAMPLE, Chat(messages, None, None, weights))
    return TrainingRow(RowFormat.CHAT, (part,), layout, None, unused)


def _system(data: Mapping[str, Any]) -> list[Message]:
    said = _optional(data, _SYSTEM_KEYS)
    return [{"role": "system", "content": said}] if said else []


def _history(history: object) -> list[Message]:
    """Pairs of a question and its answer."""
    if history is None:
        return []
    if not isinstance(history, list):
        raise RowError("history", "data_type", f"must be a list of pairs of texts, not {type_name(history)}")
    messages: list[Message] = []
    for index, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowError(f"history[{index}]", "data_type", "must be a pair of texts: question and answer")
        if not all(turn):
            raise RowError(f"history[{index}]", "missing_content", "the text is empty")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _one_of(data: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Which of these names the row uses, with something behind it if it can be; the first if none."""
    named = [name for name in names if name in data]
    given = [name for name in named if data[name] is not None] or named[:1]
    if len(given) > 1:
        raise RowError(given[1], "message_unrecognized_key", f"give {given[0]} or {given[1]}, not both")
    return given[0] if given else names[0]


def _optional(data: Mapping[str, Any], names: tuple[str, ...]) -> str:
    name = _one_of(data, names)
    return text_of(data, name, optional=True) if data.get(name) is not None else ""


def sharegpt_row(data: Mapping[str, Any]) -> TrainingRow:
    """`conversations` of `from` and `value` (or of `role` and `content`), optionally with `system` and `tools`; with
    `chosen` and `rejected` turns of `from` and `value`, a preference row."""
    key = _one_of(data, CONVERSATION_KEYS)
    unused = unused_keys(data, {key, "tools", "chosen", "rejected", *_SYSTEM_KEYS})
    turns, weights = _turns(data[key], key)
    system = _system(data)
    if system == turns[:1]:
        system = []
    elif system and turns[0]["role"] == "system":
        raise RowError(
            _one_of(data, _SYSTEM_KEYS), "message_unrecognized_key", f"{key} has a system turn already"
        )
    messages = system + turns
    given = {"tools": _tools(data.get("tools"))}
    if data.get("chosen") is not None or data.get("rejected") is not None:
        return _compared(messages, key, data, given, unused)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(key, "example_missing_assistant_message", "nothing is said by gpt or the assistant")
    chat = Chat(tuple(messages), parse_tools(given["tools"]), None, (0,) * len(system) + tuple(weights))
    return TrainingRow(RowFormat.CHAT, (Part(Role.EXAMPLE, chat),), Layout.SHAREGPT, None, unused)


def _compared(
    prompt: list[Message],
    key: str,
    data: Mapping[str, Any],
    given: Mapping[str, Any],
    unused: tuple[str, ...],
) -> TrainingRow:
    check_prompt(prompt, key)
    ends = []
    for name in ("chosen", "rejected"):
        (turn,), _ = _turns([data.get(name)], name)
        if turn["role"] != "assistant":
            raise RowError(name, "invalid_output", "must be a turn of gpt or the assistant")
        ends.append(turn)
    check_different(ends[0], ends[1], ("chosen", "rejected"))
    return pair(answered(prompt, ends[0], given), answered(prompt, ends[1], given), Layout.SHAREGPT, unused)


def _turns(conversation: object, path: str) -> tuple[list[Message], list[int]]:
    if not isinstance(conversation, list) or not conversation:
        raise RowError(
            path, "missing_messages_list", f"must be a list of turns, not {type_name(conversation)}"
        )
    named = [turn if not isinstance(turn, dict) or "from" not in turn else _named(turn, f"{path}[{index}]")
             for index, turn in enumerate(conversation)]  # fmt: skip
    return parse_turns(named, path)


def _named(turn: Mapping[str, Any], path: str) -> Message:
    """A turn of `from` and `value` under OpenAI's names."""
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SPEAKERS)
        raise RowError(f"{path}.from", "unrecognized_role", f"unknown speaker {speaker!r}; known: {known}")
    for key, said in turn.items():
        if key not in ("from", "value", "weight") and said is not None:
            raise RowError(
                f"{path}.{key}", "message_unrecognized_key", "unknown key; a turn has from, value and weight"
            )
    value = turn.get("value")
    if not isinstance(value, str):
        raise RowError(f"{path}.value", "missing_content", f"must be a string, not {type_name(value)}")
    if role == "function_call":
        return {"role": "assistant", "tool_calls": _calls(value, f"{path}.value"), **_weight(turn)}
    return {"role": role, "content": value, **_weight(turn)}


def _weight(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"weight": turn["weight"]} if "weight" in turn else {}


def _calls(value: str, path: str) -> list[dict[str, Any]]:
    """A call, or a list of calls, of name and arguments."""
    found = decode_string(value, path)
    calls = found if isinstance(found, list) else [found]
    if not calls:
        raise RowError(path, "invalid_tools", "the list of calls is empty")
    return [{"type": "function", "function": call} for call in calls]


def _tools(given: object) -> object:
    """Tools as OpenAI writes them, from a list or from JSON in a string, each whole or only its function."""
    tools = decode_string(given, "tools") if isinstance(given, str) and given.strip() else given or None
    if not isinstance(tools, list):
        return tools
    return [
        tool if not isinstance(tool, dict) or "type" in tool else {"type": "function", "function": tool}
        for tool in tools
    ]
