from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.chat import Chat, parse_messages
from lathe.text.errors import RowError
from lathe.text.rows import parse_line

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def parse_row(line: bytes) -> Chat:
    (part,) = parse_line(line).parts
    assert isinstance(part.content, Chat)
    return part.content


def row(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def test_weights_default_to_one_and_leave_the_messages() -> None:
    parsed = parse_row(row({"role": "system", "content": ""}, USER, ANSWER, USER, {**ANSWER, "weight": 0}))
    assert parsed.weights == (0, 0, 1, 0, 0)
    assert parsed.messages[4] == ANSWER


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_row(row({"role": "user", "content": parts}, ANSWER)).messages[0]["content"] == "a\nb"


def test_arguments_become_objects_and_null_keys_go() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    parsed = parse_row(row(USER, call, result, tools=[TOOL], parallel_tool_calls=False))
    function = {"name": "f", "arguments": {"a": 1}}
    assert parsed.messages[1] == {"role": "assistant", "tool_calls": [{**CALL, "function": function}]}
    assert (parsed.tools, parsed.parallel_tool_calls) == ((TOOL,), False)


def test_deprecated_functions_become_tools() -> None:
    call = {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}
    parsed = parse_row(
        row(USER, call, {"role": "function", "name": "f", "content": "1"}, functions=[TOOL["function"]])
    )
    assert parsed.tools == (TOOL,)
    assert parsed.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert parsed.messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        (b"{", "invalid_json", ""),
        (b'{"messages": NaN}', "invalid_json", ""),
        (b"[" * 100_000, "invalid_json", ""),
        (b'{"messages": "\xff"}', "invalid_utf8", ""),
        (
            row({"role": "user", "content": "x"}, ANSWER).replace(b'"x"', b'"\\ud800"'),
            "invalid_utf8",
            "messages[0].content",
        ),
        (b"[]", "data_type", ""),
        (b"{}", "missing_messages_list", "messages"),
        (row(), "missing_messages_list", "messages"),
        (b'{"messages": {}}', "missing_messages_list", "messages"),
        (row(USER, ANSWER, tool=[]), "message_unrecognized_key", "tool"),
        (row("hi", ANSWER), "data_type", "messages[0]"),
        (row({"content": "x"}, ANSWER), "message_missing_key", "messages[0].role"),
        (row({"role": "user"}, ANSWER), "message_missing_key", "messages[0].content"),
        (row({"role": "bot", "content": "x"}, ANSWER), "unrecognized_role", "messages[0].role"),
        (row({"role": ["user"], "content": "x"}, ANSWER), "unrecognized_role", "messages[0].role"),
        (row(USER, {**ANSWER, "mood": "good"}), "message_unrecognized_key", "messages[1].mood"),
        (row({**USER, "content": ""}, ANSWER), "missing_content", "messages[0].content"),
        (row(USER, {**ANSWER, "content": None}), "missing_content", "messages[1].content"),
        (row(USER, {**ANSWER, "content": []}), "missing_content", "messages[1].content"),
        (row({**USER, "content": 7}, ANSWER), "missing_content", "messages[0].content"),
        (
            row({**USER, "content": [{"type": "image_url"}]}, ANSWER),
            "unsupported_content",
            "messages[0].content[0]",
        ),
        (row(USER), "example_missing_assistant_message", "messages"),
        (row({**USER, "weight": 1}, ANSWER), "invalid_weight", "messages[0].weight"),
        (row(USER, {**ANSWER, "weight": 0.5}), "invalid_weight", "messages[1].weight"),
        (row(USER, {**ANSWER, "weight": True}), "invalid_weight", "messages[1].weight"),
        (row(USER, {**ANSWER, "weight": "1"}), "invalid_weight", "messages[1].weight"),
        (row(USER, ANSWER, tools={}), "invalid_tools", "tools"),
        (row(USER, ANSWER, tools=[{"type": "function"}]), "invalid_tools", "tools[0].function"),
        (row(USER, ANSWER, functions=[{}]), "invalid_tools", "functions[0].name"),
        (row(USER, ANSWER, parallel_tool_calls="no"), "invalid_tools", "parallel_tool_calls"),
        (
            row(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
            "invalid_tools",
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_is_wrong_is_named(line: bytes, code: str, field: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(line)
    assert (caught.value.code, caught.value.field) == (code, field)


@pytest.mark.parametrize(
    ("line", "help"),
    [
        (row(USER, ANSWER, source="a set"), "messages=messages"),
        (row(USER, {"role": "assistant", "content": None, "refusal": "I will not."}), "under content"),
    ],
)
def test_an_unknown_key_that_many_sets_have_says_what_to_do(line: bytes, help: str) -> None:
    with pytest.raises(RowError, match=help) as caught:
        parse_row(line)
    assert caught.value.code == "message_unrecognized_key"


def test_null_says_nothing_wherever_it_stands() -> None:
    """As `datasets` and SDKs write messages: with each key that some message has."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    answering = {"role": "tool", "content": "1", "tool_call_id": "c"}
    keys = ("name", "weight", "tool_calls", "tool_call_id", "function_call", "reasoning_content")
    padded = [{**dict.fromkeys(keys), **message} for message in (USER, calling, answering, ANSWER)]
    padded[1]["tool_calls"] = [{**call, "custom": None, "function": {**call["function"], "strict": None}}]
    padded[0]["content"] = [{"type": "text", "text": USER["content"], "image_url": None}]
    assert parse_row(row(*padded, prompt=None)) == parse_row(row(USER, calling, answering, ANSWER))


def test_a_weight_of_nothing_where_nothing_is_trained_is_none() -> None:
    system = {"role": "system", "content": "s"}
    weighted = row({**system, "weight": None}, {**USER, "weight": 0.0}, {**ANSWER, "weight": 1.0})
    assert parse_row(weighted) == parse_row(row(system, USER, ANSWER))


def test_a_request_needs_no_assistant_and_names_its_fields() -> None:
    conversation = parse_messages([USER], [TOOL])
    assert (conversation.messages, conversation.tools) == ((USER,), (TOOL,))
    with pytest.raises(RowError) as caught:
        parse_messages([{"role": "user"}], field_prefix="body.")
    assert caught.value.field == "body.messages[0].content"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "weight", "type", "text", "name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(messages=st.lists(JSON, max_size=3), tools=JSON)
def test_any_json_parses_or_raises_a_row_error(messages: list[Any], tools: Any) -> None:
    try:
        parse_row(json.dumps({"messages": messages, "tools": tools}).encode())
    except RowError as error:
        assert error.code and error.detail
