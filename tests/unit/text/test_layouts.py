"""Every layout that docs/data.md names: a real-looking file of each, and what is wrong with a bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.chat import Chat
from lathe.text.errors import RowError
from lathe.text.formats import METHOD_FORMATS, Layout, Role, RowFormat
from lathe.text.jsonl import Validator
from lathe.text.parts import MEANINGFUL
from lathe.text.render import RenderOptions
from lathe.text.rows import Plain, TrainingRow, parse_row
from lathe.text.sequences import tokenise_rows
from tests.unit.text.test_render import FAMILIES

FOLDER = Path(__file__).parents[2] / "fixtures" / "formats"
CHAT, PREFERENCE, UNPAIRED = RowFormat.CHAT, RowFormat.PREFERENCE, RowFormat.UNPAIRED_PREFERENCE
FILES: dict[str, tuple[RowFormat, Layout, str]] = {
    "openai_chat": (CHAT, Layout.OPENAI, ""),
    "openai_tools": (CHAT, Layout.OPENAI, ""),
    "openai_functions": (CHAT, Layout.OPENAI, ""),
    "openai_preference": (PREFERENCE, Layout.OPENAI, ""),
    "openai_preference_completion": (PREFERENCE, Layout.OPENAI, ""),
    "openai_reinforcement": (RowFormat.REINFORCEMENT, Layout.OPENAI, ""),
    "prompt_completion": (RowFormat.COMPLETION, Layout.TRL, ""),
    "alpaca": (CHAT, Layout.ALPACA, ""),
    "dolly": (CHAT, Layout.ALPACA, "category"),
    "sharegpt": (CHAT, Layout.SHAREGPT, "id"),
    "slim_orca": (CHAT, Layout.SHAREGPT, ""),
    "sharegpt_tools": (CHAT, Layout.SHAREGPT, ""),
    "sharegpt_preference": (PREFERENCE, Layout.SHAREGPT, ""),
    "trl_prompt_completion": (RowFormat.COMPLETION, Layout.TRL, ""),
    "trl_prompt_only": (RowFormat.REINFORCEMENT, Layout.TRL, ""),
    "trl_prompt_only_text": (RowFormat.REINFORCEMENT, Layout.TRL, ""),
    "trl_preference": (PREFERENCE, Layout.TRL, ""),
    "trl_preference_implicit": (PREFERENCE, Layout.TRL, ""),
    "trl_preference_chat": (PREFERENCE, Layout.TRL, ""),
    "trl_preference_chat_implicit": (
        PREFERENCE,
        Layout.TRL,
        "prompt_id, messages, score_chosen, score_rejected",
    ),
    "alpaca_preference": (PREFERENCE, Layout.ALPACA, ""),
    "question_preference": (PREFERENCE, Layout.QUESTION_ANSWER, ""),
    "orpo_mix": (PREFERENCE, Layout.TRL, "source, question"),
    "trl_unpaired": (UNPAIRED, Layout.TRL, ""),
    "trl_unpaired_chat": (UNPAIRED, Layout.OPENAI, ""),
    "question_answer": (CHAT, Layout.QUESTION_ANSWER, ""),
    "open_orca": (CHAT, Layout.QUESTION_ANSWER, "id"),
    "text": (RowFormat.TEXT, Layout.TEXT, "meta"),
    "pairs": (RowFormat.PAIR, Layout.SENTENCES, ""),
    "triplets": (RowFormat.TRIPLET, Layout.SENTENCES, ""),
    "scored_pairs": (RowFormat.SCORED_PAIR, Layout.SENTENCES, ""),
    "nli": (RowFormat.SCORED_PAIR, Layout.SENTENCES, ""),
    "labelled_text": (RowFormat.LABELLED_TEXT, Layout.SENTENCES, ""),
}


def test_there_is_a_file_of_each_layout_and_a_line_for_each_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(FILES)
    assert {found for found, _, _ in FILES.values()} == set(RowFormat)
    assert {layout for _, layout, _ in FILES.values()} == set(Layout)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_and_what_it_trains_is_tokenised(name: str) -> None:
    rows: list[TrainingRow] = []
    validator = Validator(on_row=lambda _, row: rows.append(row))
    validator.feed((FOLDER / f"{name}.jsonl").read_bytes())
    report = validator.finish()
    found, layout, unused = FILES[name]
    assert (report.valid, report.format, report.layout) == (True, found, layout)
    assert [finding.message for finding in report.findings] == (
        [f"These keys of the rows are not used: {unused}"] if unused else []
    )
    if not any(found in formats for formats in METHOD_FORMATS.values()):
        return
    for tokenised in tokenise_rows(FAMILIES["qwen"], rows, RenderOptions(4096)):
        assert not isinstance(tokenised, RowError), tokenised
        assert all(example.trained_tokens for _, example in tokenised.sequences)


def turns(row: TrainingRow, index: int = 0) -> list[tuple[str, Any]]:
    chat = row.parts[index].content
    assert isinstance(chat, Chat)
    return [(message["role"], message.get("content")) for message in chat.messages]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SAME = parse_row({"messages": [{"role": "system", "content": "s"}, user("q"), said("a")]}).parts
COMPARED = parse_row(
    {"input": {"messages": [user("q")]}, "preferred_output": [said("a")], "non_preferred_output": [said("b")]}
).parts


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a", "system": "s", "text": "### q ### a"},
        {"instruction": "q", "input": None, "output": "a", "system": "s", "id": 7},
        {"question": "q", "answer": "a", "system": "s"},
        {"system_prompt": "s", "query": "q", "response": "a"},
        {"system": "s", "prompt": "q", "response": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"conversation": [{"from": "system", "value": "s"}, user("q"), {"from": "assistant", "value": "a"}]},
        {"conversations": [{"role": "system", "content": "s"}, user("q"), said("a")]},
        {"conversations": [{"role": "system", "content": "s"}, user("q"), said("a")], "system_prompt": "s"},
        {
            "instruction": "q",
            "output": "a",
            "system": "s",
            "prompt": "### Instruction:\nq\n\n### Response:\na",
        },
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None, "markdown": None},
                {"from": "human", "value": "q", "weight": 0},
                {"from": "gpt", "value": "a", "weight": 1},
            ],
            "chosen": None,
        },
        {
            "instruction": "q",
            "response": None,
            "output": "a",
            "system": "s",
            "label_text": None,
            "messages": None,
        },
        {
            "messages": [{"role": "system", "content": "s"}, user("q"), said("a")],
            **dict.fromkeys(("conversations", "chosen", "rejected", "prompt", "text")),
        },
    ],
)
def test_one_conversation_in_many_layouts(row: dict[str, Any]) -> None:
    assert parse_row(row).parts == SAME


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]},
        {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
        {"prompt": [user("q")], "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {"prompt": "q", "chosen": [said("a")], "rejected": [said("b")]},
        {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]},
        {
            "chosen": [user("q"), said("a")],
            "rejected": [user("q"), said("b")],
            "question": "q",
            "prompt": "q",
        },
        {"question": "q", "chosen": "a", "rejected": "b", "system": ""},
        {"query": "q", "chosen": "a", "rejected": "b", "prompt": None},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
)
def test_one_comparison_in_many_layouts(row: dict[str, Any]) -> None:
    assert parse_row(row).parts == COMPARED


@pytest.mark.parametrize(("prompt", "unused"), [("q", ()), ("Be a pirate.", ("prompt",))])
def test_a_prompt_that_conversations_do_not_repeat_is_said_to_be_unused(
    prompt: str, unused: tuple[str, ...]
) -> None:
    row = parse_row({"prompt": prompt, "chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")]})
    assert (row.parts, row.unused) == (COMPARED, unused)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: Hi\n\nAssistant: I can", "\n\nHuman: Hi\n\nAssistant: I may", "\n\nHuman: Hi\n\nAssistant:"),
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("yes", "no", ""),
    ],
)  # fmt: skip
def test_the_prompt_of_two_texts_is_what_they_have_in_common(chosen: str, rejected: str, prompt: str) -> None:
    row = parse_row({"chosen": chosen, "rejected": rejected})
    assert [part.content for part in row.parts] == [
        Plain(prompt, chosen[len(prompt) :]),
        Plain(prompt, rejected[len(prompt) :]),
    ]


def test_an_instruction_and_its_input_are_two_paragraphs_and_history_comes_before() -> None:
    row = parse_row({"instruction": "Sum up.", "input": "Long.", "output": "S.", "history": [["q", "a"]]})
    assert turns(row) == [
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Sum up.\n\nLong."),
        ("assistant", "S."),
    ]


@pytest.mark.parametrize(
    ("row", "layout", "asked"),
    [
        ({"system": "s", "question": "q"}, Layout.QUESTION_ANSWER, [("system", "s"), ("user", "q")]),
        (
            {"instruction": "Sum up.", "input": "Long.", "history": [["q", "a"]], "system": "s"},
            Layout.ALPACA,
            [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "Sum up.\n\nLong.")],
        ),
    ],
)
def test_two_answers_to_a_question_or_an_instruction_are_turns_of_a_conversation(
    row: dict[str, Any], layout: Layout, asked: list[tuple[str, str]]
) -> None:
    found = parse_row({**row, "chosen": "good", "rejected": "bad", "id": 7})
    assert (found.format, found.layout, found.unused) == (PREFERENCE, layout, ("id",))
    assert [turns(found, index) for index in (0, 1)] == [
        [*asked, ("assistant", "good")],
        [*asked, ("assistant", "bad")],
    ]
    assert all(sum(part.content.weights) == 1 for part in found.parts if isinstance(part.content, Chat))


def test_sharegpt_calls_tools_and_weighs_turns() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    function = {"name": "f", "description": "F.", "parameters": {"type": "object"}}
    row = parse_row(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps([call, call])},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a", "weight": 0},
            ],
            "tools": json.dumps([function]),
        }
    )
    chat = row.parts[0].content
    assert isinstance(chat, Chat)
    assert chat.tools == ({"type": "function", "function": function},)
    assert chat.messages[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": call}, {"type": "function", "function": call}],
    }
    assert (chat.messages[2]["role"], chat.weights) == ("tool", (0, 1, 0, 0))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), said("a")]},
        {"prompt": [user("q")], "completion": [said("a")]},
        {"prompt": [user("q")], "chosen": [said("a")], "rejected": [said("b")]},
        {"prompt": [user("q")]},
        {"conversations": [user("q"), said("a")]},
    ],
)
def test_tools_may_be_json_in_a_string(row: dict[str, Any]) -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]
    written = parse_row({**row, "tools": json.dumps(tools)})
    assert written == parse_row({**row, "tools": tools}) != parse_row(row)
    assert parse_row({**row, "tools": ""}) == parse_row(row)
    with pytest.raises(RowError) as caught:
        parse_row({**row, "tools": "[{"})
    assert (caught.value.code, caught.value.field) == ("invalid_tools", "tools")


def test_what_no_method_trains_yet_is_kept_whole() -> None:
    graded = parse_row({"messages": [user("2 + 2?")], "answer": 4, "tools": []})
    assert (graded.format, graded.extra, turns(graded)) == (
        RowFormat.REINFORCEMENT,
        {"answer": 4},
        [("user", "2 + 2?")],
    )
    scored = parse_row({"sentence1": "a", "sentence2": "b", "score": 0.5})
    assert (scored.extra, [part.content for part in scored.parts]) == (
        {"label": 0.5},
        [Plain("", "a"), Plain("", "b")],
    )
    assert parse_row({"text": "a", "label": "x"}).format is RowFormat.LABELLED_TEXT
    assert parse_row({"prompt": "a", "completion": "b", "label": True}).parts[0].role is Role.DESIRABLE


HUMAN = {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"instruction": "q"}, "message_missing_key", "output"),
        ({"instruction": "q", "output": ""}, "missing_content", "output"),
        ({"instruction": 7, "output": "a"}, "data_type", "instruction"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "data_type", "input"),
        ({"instruction": "q", "output": "a", "response": "b"}, "message_unrecognized_key", "response"),
        ({"instruction": "q", "output": "a", "messages": []}, "message_unrecognized_key", "instruction"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "data_type", "history[0]"),
        ({"instruction": "q", "output": "a", "history": [["q", ""]]}, "missing_content", "history[0]"),
        ({"instruction": "q", "output": "a", "kto_tag": False}, "message_unrecognized_key", "kto_tag"),
        ({"instruction": "q", "output": "a", "images": ["x.png"]}, "message_unrecognized_key", "images"),
        ({"conversations": []}, "missing_messages_list", "conversations"),
        ({"conversations": "hi"}, "missing_messages_list", "conversations"),
        ({"conversations": [HUMAN]}, "example_missing_assistant_message", "conversations"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unrecognized_role", "conversations[0].from"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "unrecognized_role", "conversations[0].from"),
        ({"conversations": [{"from": "gpt"}]}, "missing_content", "conversations[0].value"),
        ({"conversations": [{**HUMAN, "lang": "en"}]}, "message_unrecognized_key", "conversations[0].lang"),
        ({"conversations": [{**HUMAN, "weight": 1}]}, "invalid_weight", "conversations[0].weight"),
        ({"conversations": ["hi"]}, "data_type", "conversations[0]"),
        ({"conversations": [HUMAN], "conversation": [HUMAN]}, "message_unrecognized_key", "conversation"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "invalid_tools", "conversations[0].value"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "invalid_tools", "conversations[0].value"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "a"}], "tools": "{"}, "invalid_tools", "tools"),
        ({"conversations": [HUMAN], "chosen": HUMAN, "rejected": HUMAN}, "invalid_output", "chosen"),
        (
            {"conversations": [{"from": "system", "value": "s"}], "system": "t"},
            "message_unrecognized_key",
            "system",
        ),
        ({"chosen": "a"}, "missing_output", "rejected"),
        ({"question": "q", "chosen": "a"}, "missing_output", "rejected"),
        ({"question": "q", "chosen": "a", "rejected": "a"}, "identical_outputs", "rejected"),
        ({"question": "", "chosen": "a", "rejected": "b"}, "missing_content", "question"),
        ({"question": "q", "query": "r", "chosen": "a", "rejected": "b"}, "message_unrecognized_key", "query"),
        ({"question": "q", "instruction": "r", "chosen": "a", "rejected": "b"}, "message_unrecognized_key", "question"),
        ({"question": "q", "prompt": "p", "chosen": "a", "rejected": "b"}, "message_unrecognized_key", "question"),
        ({"question": "q", "tools": [], "chosen": "a", "rejected": "b"}, "message_unrecognized_key", "tools"),
        ({"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}, "message_unrecognized_key", "output"),
        ({"instruction": "q", "output": "a", "prompt": "Another."}, "message_unrecognized_key", "prompt"),
        (
            {"chosen": [user("q"), said("a")], "rejected": [user("q"), said("b")], "question": "r"},
            "message_unrecognized_key",
            "question",
        ),
        ({"chosen": "a", "rejected": "a"}, "identical_outputs", "rejected"),
        ({"chosen": "a b", "rejected": "a"}, "missing_output", "rejected"),
        ({"chosen": "a", "rejected": [said("b")]}, "data_type", "rejected"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "invalid_prompt", "chosen"),
        ({"chosen": [user("q"), said("a"), user("r")], "rejected": [user("q"), said("b")]}, "invalid_output", "chosen"),
        ({"chosen": "a", "rejected": "b", "messages": []}, "message_unrecognized_key", "messages"),
        ({"chosen": "a", "rejected": "b", "tools": []}, "invalid_tools", "tools"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "unsupported_format", "completions"),
        ({"prompt": [said("a")]}, "invalid_prompt", "prompt"),
        ({"messages": [user("q"), said("a")], "answer": 4}, "message_unrecognized_key", "answer"),
        ({"question": "q", "answer": 4}, "data_type", "answer"),
        ({"question": "q", "answer": "a", "response": "b"}, "message_unrecognized_key", "response"),
        ({"question": "q"}, "missing_messages_list", "messages"),
        ({"anchor": "a", "positive": ""}, "missing_content", "positive"),
        ({"anchor": "a", "positive": "b", "negative": ["c"]}, "data_type", "negative"),
        ({"sentence1": "a", "sentence2": "b", "score": None}, "invalid_label", "score"),
        ({"text": "a", "label": []}, "invalid_label", "label"),
        ({"text": "a", "chat_template_kwargs": {}}, "message_unrecognized_key", "chat_template_kwargs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_content",
            "messages[0].content[0]",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_as_the_file_names_it(row: Any, code: str, field: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert (caught.value.code, caught.value.field) == (code, field)


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


def test_free_keys_do_not_nest_without_end() -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"messages": [user("q")], "facts": nested(200)})
    assert caught.value.code == "too_deep"


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a", "[]", "{}", "user", "gpt", "human"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "weight"]), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
KEYS = sorted(MEANINGFUL | {"anchor", "positive", "negative", "sentence1", "sentence2", "score", "id"})


@given(row=st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=5))
def test_any_row_has_a_format_or_says_what_is_wrong(row: dict[str, Any]) -> None:
    try:
        found = parse_row(row)
    except RowError as error:
        assert error.code and error.detail
        return
    assert found.parts
    for part in found.parts:
        if isinstance(part.content, Chat):
            assert len(part.content.weights) == len(part.content.messages)
