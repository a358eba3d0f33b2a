"""Tool calls read out of generated text, in the notation that the model's own chat template writes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from lathe.text.template import ChatTemplate

ToolCall = dict[str, Any]

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_PYTHON_TAG = "<|python_tag|>"
_MISTRAL = "[TOOL_CALLS]"


def parse_tool_calls(text: str, template: ChatTemplate) -> tuple[str | None, list[ToolCall]]:
    """(content, tool calls as OpenAI writes them: `arguments` is JSON in a string).

    Never raises: text that is not wholly a well-formed call stays content. Content is None when calls were found
    and nothing else. The same text always gives the same ids.
    """
    source = template.tool_source or template.source
    if "<tool_call>" in source:
        content, found = _hermes(text)
    elif _MISTRAL in source:
        content, found = _bare(text, _MISTRAL)
    elif _PYTHON_TAG in source or '"parameters":' in source or '\\"parameters\\":' in source:
        content, found = _bare(text, _PYTHON_TAG)
    else:
        return text, []
    if not found:
        return text, []
    return content.strip() or None, [_call(index, *pair) for index, pair in enumerate(found)]


def _hermes(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Hermes and Qwen: `<tool_call>{"name": …, "arguments": …}</tool_call>`, any number, content before them."""
    found: list[tuple[str, Any]] = []
    for match in _HERMES.finditer(text):
        pair = _named(_decode(match[1]))
        if pair is None:
            return text, []
        found.append(pair)
    return _HERMES.sub("", text), found


def _bare(text: str, tag: str) -> tuple[str, list[tuple[str, Any]]]:
    """Llama 3 and Mistral: JSON objects or a list of them, behind a tag or alone (a tag that is a special token
    does not reach the text); Llama 3 parts several with a semicolon."""
    before, tagged, after = text.partition(tag)
    content, body = (before, after) if tagged else ("", text)
    values = _values(body.strip())
    found = [_named(value) for value in values]
    pairs = [pair for pair in found if pair is not None]
    return (content, pairs) if len(pairs) == len(found) else (text, [])


def _values(text: str) -> list[Any]:
    """The JSON values in a row that make up the whole text; none if anything else is in it."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    place = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        values += value if isinstance(value, list) else [value]
        while place < len(text) and text[place] in "; \t\r\n":
            place += 1
    return values


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _named(value: Any) -> tuple[str, Any] | None:
    """Name and arguments of one call; None if it is none. An extra `type: function` and `id` are tolerated."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _decode(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    if set(value) - {"name", "arguments", "parameters", "type", "id"}:
        return None
    return name, arguments


def _call(index: int, name: str, arguments: Any) -> ToolCall:
    text = json.dumps(arguments, ensure_ascii=False)
    digest = hashlib.sha256(f"{index}\n{name}\n{text}".encode("utf-8", "replace")).hexdigest()
    return {"id": f"call_{digest[:24]}", "type": "function", "function": {"name": name, "arguments": text}}
