"""A training row as a line of JSON: the inverse of `lathe.text.rows.parse_row`.

What it is written as: rows of OpenAI's layout under OpenAI's names; other conversations as ShareGPT's `conversations`
(of role and content), so that keys which are not looked at (an id, a source) may stand beside them; all else as TRL
names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.json import encode

from lathe.text.chat import Chat, Message
from lathe.text.formats import Layout, Role, RowFormat
from lathe.text.parts import MEANINGFUL, Plain, TrainingRow


def row_line(row: TrainingRow, data: Mapping[str, Any]) -> bytes:
    """The row without a newline. Parsed again it gives the same parts. row: of a format that a method trains on.
    data: what it was parsed from, for the keys that are not looked at; those that only repeat the row are left out."""
    kept = {key: data[key] for key in row.unused if key not in MEANINGFUL}
    return encode({**_said(row), **kept})


def _said(row: TrainingRow) -> dict[str, Any]:
    content = row.parts[0].content
    match row.format:
        case RowFormat.TEXT:
            assert isinstance(content, Plain)
            return {"text": content.completion}
        case RowFormat.CHAT:
            assert isinstance(content, Chat)
            key = "messages" if row.layout is Layout.OPENAI else "conversations"
            return {key: _turns(content), **_tools(content)}
        case RowFormat.PREFERENCE:
            return _pair(row)
        case RowFormat.UNPAIRED_PREFERENCE:
            return {**_judged(row, content), "label": row.parts[0].role is Role.DESIRABLE}
        case _:
            return _prompted(content)


def _pair(row: TrainingRow) -> dict[str, Any]:
    chosen, rejected = (_answer(part.content) for part in row.parts)
    content = row.parts[0].content
    if row.layout is Layout.OPENAI:
        assert isinstance(content, Chat)
        given = {"messages": content.messages[:-1], **_tools(content)}
        return {"input": given, "preferred_output": chosen, "non_preferred_output": rejected}
    return {"prompt": _prompt(content), "chosen": chosen, "rejected": rejected, **_tools(content)}


def _judged(row: TrainingRow, content: Chat | Plain) -> dict[str, Any]:
    if row.layout is Layout.OPENAI and isinstance(content, Chat):
        return {"messages": content.messages, **_tools(content)}
    return _prompted(content)


def _prompted(content: Chat | Plain) -> dict[str, Any]:
    return {"prompt": _prompt(content), "completion": _answer(content), **_tools(content)}


def _prompt(content: Chat | Plain) -> object:
    return content.prompt if isinstance(content, Plain) else content.messages[:-1]


def _answer(content: Chat | Plain) -> object:
    return content.completion if isinstance(content, Plain) else content.messages[-1:]


def _turns(chat: Chat) -> list[Message]:
    """The messages, with the weights that are not what a message has without one."""
    return [
        {**message, "weight": 0} if message["role"] == "assistant" and not weight else message
        for message, weight in zip(chat.messages, chat.weights, strict=True)
    ]


def _tools(content: Chat | Plain) -> dict[str, Any]:
    if isinstance(content, Plain):
        return {}
    given = {"tools": content.tools, "parallel_tool_calls": content.parallel_tool_calls}
    return {key: value for key, value in given.items() if value is not None}
