"""The messages of a training row or of a request: checked, and brought into the shape that templates read.

The shape: `content` a string (text parts are joined by a newline), `tool_calls` with `arguments` as an object
(as Hugging Face templates expect), the deprecated `function_call` and role `function` as their successors, no
null and no `weight` (it lives in `Chat.weights`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from lathe.text.decoding import check_depth, check_unicode, decode_json, decode_string, type_name
from lathe.text.errors import RowError

Message = dict[str, Any]
Tool = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PLAIN_WEIGHTS = {"system": 0, "developer": 0, "user": 0, "tool": 0, "assistant": 1}
CHAT_KEYS = frozenset({"messages", "tools", "parallel_tool_calls", "functions"})
_COMMON_KEYS = frozenset({"role", "content", "name"})
_ASSISTANT_KEYS = _COMMON_KEYS | {"weight", "tool_calls", "function_call"}
# What an SDK's own message object carries along, empty for text: accepted as null or empty, then dropped.
_EMPTY_ASSISTANT_KEYS = frozenset({"refusal", "audio", "annotations"})
_TOOL_KEYS = _COMMON_KEYS | {"tool_call_id"}


class Chat(Struct, frozen=True):
    """A conversation to train on.

    weights: one per message; 1 where an assistant's turn is trained (the default), 0 elsewhere.
    tools: None when the row has none.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None
    parallel_tool_calls: bool | None
    weights: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a request, in the shape that templates read."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None


def parse_chat(data: Mapping[str, Any]) -> Chat:
    """Checks one row of a supervised chat file. Raises RowError, which names the field and the code."""
    if "messages" not in data:
        raise RowError("messages", "missing_messages_list", "the row has no list of messages")
    for key, value in data.items():
        if key not in CHAT_KEYS and value is not None:
            known = ", ".join(sorted(CHAT_KEYS))
            raise RowError(
                key,
                "message_unrecognized_key",
                f"unknown key; a row may have {known}. Leave it out, or give a mapping of columns (such as "
                "messages=messages), which takes only what it names",
            )
    messages, weights = parse_turns(data["messages"], "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("messages", "example_missing_assistant_message", "no message has the role assistant")
    parallel = parse_parallel_tool_calls(data.get("parallel_tool_calls"))
    tools = parse_row_tools(data)
    return Chat(tuple(messages), tools, parallel, tuple(weights))


def parse_messages(
    messages: object,
    tools: object = None,
    field_prefix: str = "",
    *,
    functions: object = None,
) -> Conversation:
    """The same checks for a request at inference; no assistant turn is needed. Raises RowError.

    `field_prefix` is put before each field's path.
    """
    for name, value in (("messages", messages), ("tools", tools), ("functions", functions)):
        check_depth(value, f"{field_prefix}{name}")
        check_unicode(value, f"{field_prefix}{name}")
    parsed, _ = parse_turns(messages, f"{field_prefix}messages")
    return Conversation(tuple(parsed), parse_tools(tools, functions, field_prefix))


def parse_tools(tools: object, functions: object = None, field_prefix: str = "") -> tuple[Tool, ...] | None:
    """Checks `tools`, or the deprecated `functions`, which become tools. None and an empty list: no tools."""
    if tools is not None and functions is not None:
        raise RowError(f"{field_prefix}functions", "invalid_tools", "give tools or functions, not both")
    name = "tools" if functions is None else "functions"
    entries = tools if functions is None else functions
    path = f"{field_prefix}{name}"
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise RowError(path, "invalid_tools", f"must be a list, not {type_name(entries)}")
    found: list[Tool] = []
    for index, entry in enumerate(entries):
        tool = {"type": "function", "function": entry} if name == "functions" else entry
        _check_tool(tool, f"{path}[{index}]", "" if name == "functions" else ".function")
        found.append(tool)
    check_depth(found, path)
    return tuple(found) or None


def parse_row_tools(data: Mapping[str, Any], field_prefix: str = "") -> tuple[Tool, ...] | None:
    """The tools of a training row: as parse_tools takes them, or that as JSON in a string, as tables and TRL have it.
    Raises RowError."""
    tools = data.get("tools")
    if isinstance(tools, str):
        tools = decode_string(tools, f"{field_prefix}tools") if tools.strip() else None
    return parse_tools(tools, data.get("functions"), field_prefix)


def parse_parallel_tool_calls(value: object, field_prefix: str = "") -> bool | None:
    """Checks `parallel_tool_calls`. Raises RowError."""
    if value is not None and not isinstance(value, bool):
        raise RowError(f"{field_prefix}parallel_tool_calls", "invalid_tools", "must be true or false")
    return value


def parse_turns(messages: object, path: str) -> tuple[list[Message], list[int]]:
    """The messages and their weights; there is at least one. `path` is where they stand. They are text throughout, as
    decode_json gives them. Raises RowError."""
    if not isinstance(messages, list):
        raise RowError(
            path, "missing_messages_list", f"must be a list of messages, not {type_name(messages)}"
        )
    if not messages:
        raise RowError(path, "missing_messages_list", "the list of messages is empty")
    parsed: list[Message] = []
    weights: list[int] = []
    for index, message in enumerate(messages):
        plain_weight = _plain_weight(message)
        if plain_weight is None:
            result, weight = _parse_message(message, f"{path}[{index}]")
        else:
            result, weight = message, plain_weight
        parsed.append(result)
        weights.append(weight)
    return parsed, weights


def _plain_weight(message: object) -> int | None:
    """The weight of a message that is its own parsed form, as most are: role and text, nothing else. None for any
    other, good or bad."""
    if type(message) is not dict or len(message) != 2:
        return None
    role, content = message.get("role"), message.get("content")
    if type(content) is not str or not content or type(role) is not str:
        return None
    return _PLAIN_WEIGHTS.get(role)


def _parse_message(message: object, path: str) -> tuple[Message, int]:
    if not isinstance(message, dict):
        raise RowError(path, "data_type", f"a message must be an object, not {type_name(message)}")
    if message.get("role") is None:
        raise RowError(f"{path}.role", "message_missing_key", "the message has no role")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(
            f"{path}.role", "unrecognized_role", f"unknown role {role!r}; known: {', '.join(ROLES)}"
        )
    _check_keys(message, role, path)
    result: Message = {"role": "tool" if role == "function" else role}
    calls = _tool_calls(message, path) if role == "assistant" else []
    content = _content(message, path, role, optional=bool(calls))
    if content is not None:
        result["content"] = content
    if calls:
        result["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise RowError(
                    f"{path}.{key}", "data_type", f"must be a string, not {type_name(message[key])}"
                )
            result[key] = message[key]
    return result, _weight(message, path) if role == "assistant" else 0


def _check_keys(message: Mapping[str, Any], role: str, path: str) -> None:
    allowed = {"assistant": _ASSISTANT_KEYS, "tool": _TOOL_KEYS, "function": _TOOL_KEYS}.get(
        role, _COMMON_KEYS
    )
    for key, value in message.items():
        if (
            value is None
            or key in allowed
            or (role == "assistant" and key in _EMPTY_ASSISTANT_KEYS and not value)
        ):
            continue
        if key == "weight":
            # What is not trained anyway may say so, as in sets that weigh each turn.
            if _weight(message, path) == 0:
                continue
            raise RowError(
                f"{path}.weight",
                "invalid_weight",
                "only a message of the assistant can be trained; give it weight 0",
            )
        raise RowError(f"{path}.{key}", "message_unrecognized_key", _unknown_key(key, role, allowed))


def _unknown_key(key: str, role: str, allowed: Collection[str]) -> str:
    if role == "assistant" and key == "refusal":
        return "a refusal is not trained from here; write what the assistant should say under content"
    return f"unknown key; a message of role {role} may have {', '.join(sorted(allowed))}"


def _weight(message: Mapping[str, Any], path: str) -> int:
    weight = message.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{path}.weight", "invalid_weight", f"must be 0 or 1, not {json.dumps(weight)}")
    return int(weight)


def _content(message: Mapping[str, Any], path: str, role: str, *, optional: bool) -> str | None:
    """The text of a message. Empty text is an error for user and assistant; None only beside tool calls."""
    field = f"{path}.content"
    if message.get("content") is None:
        if optional:
            return None
        code = "missing_content" if "content" in message else "message_missing_key"
        raise RowError(field, code, f"the message of role {role} has no content")
    content = message["content"]
    text = _join_parts(content, field) if isinstance(content, list) else content
    if not isinstance(text, str):
        raise RowError(
            field, "missing_content", f"must be a string or a list of text parts, not {type_name(text)}"
        )
    if not text and role in ("user", "assistant") and not optional:
        raise RowError(field, "missing_content", f"the content of a message of role {role} is empty")
    return text


def _join_parts(parts: Sequence[Any], field: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        where = f"{field}[{index}]"
        if not isinstance(part, dict):
            raise RowError(where, "missing_content", f"a part must be an object, not {type_name(part)}")
        if part.get("type") != "text":
            kind = json.dumps(part.get("type"), ensure_ascii=False)
            raise RowError(
                where,
                "unsupported_content",
                f"a part of type {kind} is no text; only text can be trained on and answered until there are models "
                "that take more",
            )
        if not isinstance(part.get("text"), str):
            raise RowError(f"{where}.text", "missing_content", "a text part needs a string under text")
        for key, value in part.items():
            if key not in ("type", "text") and value is not None:
                raise RowError(
                    f"{where}.{key}", "message_unrecognized_key", "a text part has only type and text"
                )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
    calls, single = message.get("tool_calls"), message.get("function_call")
    if calls is not None and single is not None:
        raise RowError(f"{path}.function_call", "invalid_tools", "give tool_calls or function_call, not both")
    if single is not None:
        return [{"type": "function", "function": _function(single, f"{path}.function_call")}]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowError(f"{path}.tool_calls", "invalid_tools", f"must be a list, not {type_name(calls)}")
    return [_tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(path, "invalid_tools", f"a tool call must be an object, not {type_name(call)}")
    if call.get("type", "function") != "function":
        raise RowError(f"{path}.type", "invalid_tools", "only tool calls of type function are supported")
    for key, value in call.items():
        if key not in ("id", "type", "function", "index") and value is not None:
            raise RowError(
                f"{path}.{key}", "message_unrecognized_key", "a tool call has id, type and function"
            )
    result: dict[str, Any] = {}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise RowError(f"{path}.id", "invalid_tools", "must be a string")
        result["id"] = call["id"]
    result["type"] = "function"
    result["function"] = _function(call.get("function"), f"{path}.function")
    return result


def _function(function: object, path: str) -> dict[str, Any]:
    """Name and arguments of a call; the arguments, on the wire JSON in a string, become an object."""
    if not isinstance(function, dict):
        raise RowError(
            path, "invalid_tools", f"must be an object with name and arguments, not {type_name(function)}"
        )
    for key, value in function.items():
        if key not in ("name", "arguments") and value is not None:
            raise RowError(
                f"{path}.{key}", "message_unrecognized_key", "a function call has name and arguments"
            )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{path}.name", "invalid_tools", "the function call needs a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments.encode()) if arguments.strip() else {}
        except RowError:
            raise RowError(f"{path}.arguments", "invalid_tools", "the arguments are not valid JSON") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(
            f"{path}.arguments", "invalid_tools", "the arguments must be a JSON object (in a string)"
        )
    check_depth(arguments, f"{path}.arguments")
    return {"name": function["name"], "arguments": arguments}


def _check_tool(tool: object, path: str, inner: str) -> None:
    if not isinstance(tool, dict):
        raise RowError(path, "invalid_tools", f"a tool must be an object, not {type_name(tool)}")
    if tool.get("type") != "function":
        raise RowError(f"{path}.type", "invalid_tools", "only tools of type function are supported")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RowError(
            f"{path}{inner}", "invalid_tools", "must be an object with name, description and parameters"
        )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{path}{inner}.name", "invalid_tools", "the function needs a name")
    for key, kind in (("description", str), ("parameters", dict)):
        if function.get(key) is not None and not isinstance(function[key], kind):
            wanted = "a string" if kind is str else "a JSON schema object"
            raise RowError(f"{path}{inner}.{key}", "invalid_tools", f"must be {wanted}")
