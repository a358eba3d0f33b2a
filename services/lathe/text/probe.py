"""What a chat template does with a conversation of a given shape, whatever its texts say: probed with marked texts,
once a shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from lathe.text.chat import Chat
from lathe.text.errors import TemplateError
from lathe.text.render import prepare
from lathe.text.template import ChatTemplate

_NOW = datetime(2000, 1, 1)
_TOOL = "lathe_probe_tool"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message without its texts. calls: how many tools it calls. keys: what else it has."""

    role: str
    has_content: bool
    calls: int
    keys: tuple[str, ...]


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
        return self._cached(tuple(map(_turn, chat.messages)), bool(chat.tools))

    def _probe(self, turns: tuple[Turn, ...], has_tools: bool) -> Losses:
        messages = [_marked(index, turn) for index, turn in enumerate(turns)]
        tools = [{"type": "function", "function": _function(_TOOL)}] if has_tools else None
        try:
            text = self._template.render(prepare(messages, self._template), tools, now=_NOW)
        except TemplateError:
            return Losses()
        places = [text.find(_content(index)) for index, turn in enumerate(turns) if turn.has_content]
        written = [index for index, turn in enumerate(turns) if turn.has_content]
        found = [(index, place) for index, place in zip(written, places, strict=True) if place >= 0]
        late = tuple(
            index
            for n, (index, place) in enumerate(found)
            if any(place > later for _, later in found[n + 1 :])
        )
        dropped = tuple(_dropped(turns, text))
        return Losses(dropped, late, has_tools and _TOOL not in text)


def _dropped(turns: Sequence[Turn], text: str) -> Iterator[tuple[int, str]]:
    for index, turn in enumerate(turns):
        if turn.has_content and _content(index) not in text:
            yield index, "content"
        if any(_call(index, n) not in text for n in range(turn.calls)):
            yield index, "tool_calls"


def _turn(message: Mapping[str, Any]) -> Turn:
    keys = tuple(key for key in ("name", "tool_call_id") if key in message)
    return Turn(message["role"], bool(message.get("content")), len(message.get("tool_calls") or ()), keys)


def _marked(index: int, turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, **dict.fromkeys(turn.keys, "lathe00000")}
    if turn.has_content:
        message["content"] = _content(index)
    if turn.calls:
        message["tool_calls"] = [
            {"id": "lathe00000", "type": "function", "function": {"name": _call(index, n), "arguments": {}}}
            for n in range(turn.calls)
        ]
    return message


def _content(index: int) -> str:
    return f"lathe probe text {index} end"


def _call(index: int, number: int) -> str:
    return f"lathe_probe_call_{index}_{number}_end"


def _function(name: str) -> dict[str, Any]:
    return {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}}
