"""What a chat template does with a conversation of a given shape, whatever its texts say: probed with marked texts,
once a shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from sys import maxsize
from typing import Any

from lathe.text.chat import Chat
from lathe.text.errors import TemplateError
from lathe.text.render import prepare
from lathe.text.template import ChatTemplate

_NOW = datetime(2000, 1, 1)
_TOOL = "lathe_probe_tool"
# Mistral's templates take nine letters and digits only.
_ID = "lathe0000"
# As _content, _reasoning and _call write them: found in one pass, since a row may have very many.
_CONTENT = re.compile(r"lathe probe text (\d+) end")
_REASONING = re.compile(r"lathe probe reasoning (\d+) end")
_CALL = re.compile(r"lathe_probe_call_(\d+)_(\d+)_end")
# Longer conversations hardly have the shape of another one, and remembering a thousand takes memory.
_REMEMBERED_TURNS = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """One message without its texts. calls: how many tools it calls. keys: what else it has. reasons: whether it is a
    trained answer that begins with reasoning, which some templates leave out."""

    role: str
    has_content: bool
    calls: int
    keys: tuple[str, ...]
    reasons: bool


@dataclass(frozen=True, slots=True)
class Losses:
    """What the template does not write. dropped: (index of a message, what of it). reordered: indexes of messages that
    stand before one that precedes them. tools: whether the tools are left out."""

    dropped: tuple[tuple[int, str], ...] = ()
    reordered: tuple[int, ...] = ()
    tools: bool = False


class TemplateProbe:
    """Answers from a cache; rows of a file have few shapes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._cached = lru_cache(maxsize=1024)(self._probe)

    def losses(self, chat: Chat) -> Losses:
        """Nothing for a shape that the template refuses: that is another finding."""
        probe = self._cached if len(chat.messages) <= _REMEMBERED_TURNS else self._probe
        return probe(tuple(map(_turn, chat.messages, chat.weights)), bool(chat.tools))

    def _probe(self, turns: tuple[Turn, ...], has_tools: bool) -> Losses:
        messages = [_marked(index, turn) for index, turn in enumerate(turns)]
        tools = [{"type": "function", "function": _function(_TOOL)}] if has_tools else None
        try:
            text = self._template.render(prepare(messages, self._template), tools, now=_NOW)
        except TemplateError:
            return Losses()
        contents: dict[int, int] = {}
        for match in _CONTENT.finditer(text):
            contents.setdefault(int(match[1]), match.start())
        reasons = {int(match[1]) for match in _REASONING.finditer(text)}
        calls = {(int(match[1]), int(match[2])) for match in _CALL.finditer(text)}
        found = [(index, contents[index]) for index, _ in enumerate(turns) if index in contents]
        dropped = tuple(_dropped(turns, contents, reasons, calls))
        return Losses(dropped, _late(found), has_tools and _TOOL not in text)


def _late(found: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Of (index, place) those that stand behind one of the later ones."""
    late: list[int] = []
    first = maxsize
    for index, place in reversed(found):
        if place > first:
            late.append(index)
        first = min(first, place)
    return tuple(reversed(late))


def _dropped(
    turns: Sequence[Turn],
    contents: Collection[int],
    reasons: Collection[int],
    calls: Collection[tuple[int, int]],
) -> Iterator[tuple[int, str]]:
    """contents, reasons, calls: what the template wrote, by index."""
    for index, turn in enumerate(turns):
        if turn.has_content and index not in contents:
            yield index, "content"
        elif turn.reasons and index not in reasons:
            yield index, "reasoning"
        if any((index, n) not in calls for n in range(turn.calls)):
            yield index, "tool_calls"


def _turn(message: Mapping[str, Any], weight: int) -> Turn:
    keys = tuple(key for key in ("name", "tool_call_id") if key in message)
    content = message.get("content") or ""
    reasons = bool(weight) and content.lstrip().startswith("<think>") and "</think>" in content
    return Turn(message["role"], bool(content), len(message.get("tool_calls") or ()), keys, reasons)


def _marked(index: int, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, **dict.fromkeys(turn.keys, _ID)}
    if turn.has_content:
        reasoning = f"<think>\n{_reasoning(index)}\n</think>\n\n" if turn.reasons else ""
        message["content"] = reasoning + _content(index)
    if turn.calls:
        message["tool_calls"] = [
            {"id": _ID, "type": "function", "function": {"name": _call(index, n), "arguments": {}}}
            for n in range(turn.calls)
        ]
    return message


def _content(index: int) -> str:
    return f"lathe probe text {index} end"


def _reasoning(index: int) -> str:
    return f"lathe probe reasoning {index} end"


def _call(index: int, number: int) -> str:
    return f"lathe_probe_call_{index}_{number}_end"


def _function(name: str) -> dict[str, Any]:
    return {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
