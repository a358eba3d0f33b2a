"""Every format of a training file: what a good row becomes, and what is wrong with a bad one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lathe.text.chat import Chat
from lathe.text.errors import RowError
from lathe.text.formats import Role, RowFormat
from lathe.text.rows import Part, Plain, TrainingRow, parse_line

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PAIR = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}


def parse(row: Any) -> TrainingRow:
    return parse_line(json.dumps(row).encode())


def chats(row: TrainingRow) -> list[Chat]:
    return [part.content for part in row.parts if isinstance(part.content, Chat)]


def test_a_preference_row_is_two_conversations_with_one_prompt() -> None:
    given = {"messages": [USER, GOOD, USER], "tools": [TOOL], "parallel_tool_calls": False}
    row = parse({**PAIR, "input": given})
    chosen, rejected = chats(row)
    assert (row.format, [part.role for part in row.parts]) == (
        RowFormat.PREFERENCE,
        [Role.CHOSEN, Role.REJECTED],
    )
    assert chosen == Chat((USER, GOOD, USER, GOOD), (TOOL,), False, (0, 0, 0, 1))
    assert rejected == Chat((USER, GOOD, USER, BAD), (TOOL,), False, (0, 0, 0, 1))


def test_outputs_have_an_older_name() -> None:
    older = {"input": PAIR["input"], "preferred_completion": [GOOD], "non_preferred_completion": [BAD]}
    assert parse(older) == parse(PAIR)


@pytest.mark.parametrize(("label", "role"), [(True, Role.DESIRABLE), (False, Role.UNDESIRABLE)])
def test_a_label_is_about_the_last_turn(label: bool, role: Role) -> None:
    row = parse({"messages": [USER, BAD, USER, GOOD], "label": label})
    assert row.parts == (Part(role, Chat((USER, BAD, USER, GOOD), None, None, (0, 0, 0, 1))),)
    assert parse({"prompt": [USER, BAD, USER], "completion": [GOOD], "label": label}).parts == row.parts
    plain = parse({"prompt": "a", "completion": "b", "label": label})
    assert (plain.format, plain.parts) == (RowFormat.UNPAIRED_PREFERENCE, (Part(role, Plain("a", "b")),))


def test_completions_and_texts() -> None:
    joined = parse({"prompt": "a", "completion": "b", "tools": None, "chosen": None, "label_id": None})
    assert joined.parts == (Part(Role.EXAMPLE, Plain("a", "b")),)
    assert parse({"prompt": "", "completion": "b"}).parts == (Part(Role.EXAMPLE, Plain("", "b")),)
    turns = parse({"prompt": [USER], "completion": [GOOD], "tools": [TOOL]})
    assert (turns.format, chats(turns)) == (RowFormat.COMPLETION, [Chat((USER, GOOD), (TOOL,), None, (0, 1))])
    text = parse({"text": "a\nb"})
    assert (text.format, text.parts) == (RowFormat.TEXT, (Part(Role.EXAMPLE, Plain("", "a\nb")),))


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ([], "data_type", ""),
        ({**PAIR, "input": [USER]}, "missing_input", "input"),
        ({"preferred_output": [GOOD]}, "missing_input", "input"),
        ({**PAIR, "input": {}}, "missing_messages_list", "input.messages"),
        ({**PAIR, "input": {"messages": [USER], "x": 1}}, "message_unrecognized_key", "input.x"),
        ({**PAIR, "input": {"messages": [USER, GOOD]}}, "invalid_prompt", "input.messages"),
        ({**PAIR, "input": {"messages": [{"role": "bot"}]}}, "unrecognized_role", "input.messages[0].role"),
        ({**PAIR, "input": {"messages": [USER], "tools": {}}}, "invalid_tools", "input.tools"),
        (
            {**PAIR, "input": {"messages": [USER], "parallel_tool_calls": 1}},
            "invalid_tools",
            "input.parallel_tool_calls",
        ),
        ({**PAIR, "comment": ""}, "message_unrecognized_key", "comment"),
        ({**PAIR, "preferred_output": None}, "missing_output", "preferred_output"),
        ({**PAIR, "preferred_completion": [GOOD]}, "missing_output", "preferred_completion"),
        ({**PAIR, "preferred_output": "hello"}, "missing_messages_list", "preferred_output"),
        ({**PAIR, "preferred_output": [GOOD, GOOD]}, "invalid_output", "preferred_output"),
        ({**PAIR, "non_preferred_output": [USER]}, "invalid_output", "non_preferred_output"),
        ({**PAIR, "non_preferred_output": [GOOD]}, "identical_outputs", "non_preferred_output"),
        (
            {**PAIR, "preferred_output": [{**GOOD, "weight": 0}]},
            "invalid_weight",
            "preferred_output[0].weight",
        ),
        ({"messages": [USER, GOOD], "label": 1}, "invalid_label", "label"),
        ({"messages": [USER, GOOD], "label": None}, "invalid_label", "label"),
        ({"messages": [USER, GOOD, USER], "label": True}, "example_missing_assistant_message", "messages"),
        ({"messages": [GOOD], "label": True}, "invalid_prompt", "messages"),
        ({"messages": [USER, {**GOOD, "weight": 1}], "label": True}, "invalid_weight", "messages[1].weight"),
        ({"label": True}, "missing_messages_list", "messages"),
        ({"messages": [USER, GOOD], "label": True, "prompt": "x"}, "message_unrecognized_key", "prompt"),
        ({"messages": [USER, GOOD], "prompt": "x"}, "message_unrecognized_key", "prompt"),
        ({"prompt": "a", "completion": None}, "data_type", "completion"),
        ({"prompt": "a", "answer": "b"}, "message_unrecognized_key", "answer"),
        ({"prompt": ""}, "missing_content", "prompt"),
        ({"completion": "a"}, "message_missing_key", "prompt"),
        ({"prompt": 7, "completion": "a"}, "data_type", "prompt"),
        ({"prompt": "a", "completion": ""}, "missing_content", "completion"),
        ({"prompt": "a", "completion": [GOOD]}, "data_type", "completion"),
        ({"prompt": [USER], "completion": "a"}, "missing_messages_list", "completion"),
        ({"prompt": [USER], "completion": [USER]}, "invalid_output", "completion"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "invalid_tools", "tools"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "message_unrecognized_key", "text"),
        ({"text": ""}, "missing_content", "text"),
        ({"text": None}, "data_type", "text"),
        ({"text": "\ud800"}, "invalid_utf8", "text"),
        ({"texts": "a"}, "missing_messages_list", "messages"),
    ],
)
def test_what_is_wrong_is_named(row: Any, code: str, field: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert (caught.value.code, caught.value.field) == (code, field)


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": st.text(max_size=3) | st.none()},
    optional={"weight": st.sampled_from([0, 1, None])},
)
VALUE = st.none() | st.booleans() | st.text(max_size=4) | st.lists(MESSAGE, max_size=3)
KEYS = (
    "messages", "tools", "label", "prompt", "completion", "text", "preferred_output", "non_preferred_output",
    "preferred_completion", "other",
)  # fmt: skip
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=4) | st.fixed_dictionaries(
    {
        "input": st.dictionaries(st.sampled_from(["messages", "tools", "other"]), VALUE, max_size=2),
        "preferred_output": VALUE,
        "non_preferred_output": VALUE,
    }
)


@given(row=ROWS)
@example(row={"prompt": [{"role": "user", "content": "0"}]})
def test_any_row_parses_to_its_format_or_says_what_is_wrong(row: dict[str, Any]) -> None:
    try:
        found = parse(row)
    except RowError as error:
        assert error.code and error.detail
        return
    assert [part.role for part in found.parts] == {
        RowFormat.PREFERENCE: [Role.CHOSEN, Role.REJECTED],
        RowFormat.UNPAIRED_PREFERENCE: [Role.DESIRABLE if row.get("label") else Role.UNDESIRABLE],
    }.get(found.format, [Role.EXAMPLE])
    for chat in chats(found):
        assert len(chat.weights) == len(chat.messages)
        last = 0 if found.format is RowFormat.REINFORCEMENT else 1
        assert found.format is RowFormat.CHAT or chat.weights == (0,) * (len(chat.messages) - 1) + (last,)
