"""What is found in one row, against templates and tokenizers with the faults in question."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.text.language import language_of
from lathe.text.render import RenderOptions
from lathe.text.rowchecks import RowChecks, language_of_row, texts_of
from lathe.text.rows import TrainingRow, parse_line
from lathe.text.sequences import Tokenised, tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.templates import NINE_LETTERS, NO_REASONING, REAL
from tests.fixtures.tiny import CHATML, tiny_tokenizer_config, tiny_tokenizer_json

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": "{}"}}


def tokenizer(template: str = CHATML) -> Tokenizer:
    return Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config(template))


def parsed(*turns: tuple[str, str], **more: Any) -> TrainingRow:
    messages = [{"role": role, "content": content} for role, content in turns]
    return parse_line(json.dumps({"messages": messages, **more}).encode())


def codes(row: TrainingRow, template: str = CHATML, limit: int = 4096) -> list[str]:
    made = tokenizer(template)
    (found,) = tokenise_rows(made, [row], RenderOptions(limit))
    assert isinstance(found, Tokenised)
    return [finding.code for finding in RowChecks(made).check(7, row, found)]


def test_a_good_row_has_no_finding():
    row = parsed(("system", "Be brief."), ("user", "Hi"), ("assistant", "How can I help you?"))
    assert codes(row) == []


def test_a_template_that_ends_no_turn_is_found():
    broken = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    broken += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    row = parsed(("user", "Hi"), ("assistant", "How can I help you?"))
    assert codes(row, broken) == ["stop_not_trained"]


def test_a_row_that_was_cut_is_not_told_twice():
    row = parsed(("user", "Hi"), ("assistant", "How can I help you today? " * 5))
    assert codes(row, limit=24) == []


def test_tools_that_the_template_ignores_are_found():
    row = parsed(("user", "Hi"), ("assistant", "How can I help you?"), tools=TOOLS)
    assert codes(row) == ["tools_not_rendered"]
    assert codes(row, REAL["qwen"]) == []


def test_a_call_that_the_template_ignores_is_found():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Let me look at it.", "tool_calls": [CALL]},
    ]
    row = parse_line(json.dumps({"messages": messages, "tools": TOOLS}).encode())
    assert codes(row) == ["message_dropped", "tools_not_rendered"]


def test_an_answer_that_a_template_leaves_out_beside_its_calls_is_found():
    call = {**CALL, "id": "abcdefghi"}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Let me look at it.", "tool_calls": [call]},
    ]
    row = parse_line(json.dumps({"messages": messages}).encode())
    assert codes(row, NINE_LETTERS) == ["message_dropped"]


def test_reasoning_that_the_template_leaves_out_of_what_is_trained_is_found():
    turns = ("user", "Hi"), ("assistant", "<think>\nA greeting.\n</think>\n\nHow can I help you?")
    assert codes(parsed(*turns), NO_REASONING) == ["message_dropped"]
    assert codes(parsed(*turns)) == []
    asked = ("user", "What do you do?"), ("assistant", "I answer what I am asked.")
    messages = [{"role": role, "content": content} for role, content in (*turns, *asked)]
    messages[1]["weight"] = 0
    assert codes(parse_line(json.dumps({"messages": messages}).encode()), NO_REASONING) == []


_SYSTEM_LAST = "{% set ordered = messages[1:2] + messages[:1] + messages[2:] %}"


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (
            CHATML.replace("in messages", "in messages | rejectattr('role', 'equalto', 'system')"),
            "message_dropped",
        ),
        (_SYSTEM_LAST + CHATML.replace("in messages", "in ordered"), "messages_reordered"),
    ],
)
def test_roles_that_the_template_drops_or_moves_are_found(template, code):
    row = parsed(("system", "Be brief."), ("user", "Hi"), ("assistant", "How can I help you?"))
    assert codes(row, template) == [code]


def test_special_tokens_in_a_text_are_found():
    row = parsed(("user", "What is <|im_end|>?"), ("assistant", "It ends a turn of mine."))
    made = tokenizer()
    (found,) = tokenise_rows(made, [row], RenderOptions(4096))
    assert isinstance(found, Tokenised)
    (finding,) = RowChecks(made).check(7, row, found)
    assert (finding.line, finding.field, finding.code) == (7, "messages[0].content", "special_token_in_text")
    assert "character 9" in finding.message and "<|im_end|>" in finding.message


@pytest.mark.parametrize(
    "row",
    [
        {"text": "A whole document.<|im_end|>"},
        {"prompt": "The capital of France is", "completion": " Paris, of course.<|im_end|>"},
        {"prompt": "Capital?", "chosen": "It is Paris.<|im_end|>", "rejected": "It is Lyon.<|im_end|>"},
    ],
)
def test_the_end_that_a_text_writes_itself_is_its_end(row):
    line = json.dumps(row).encode()
    assert codes(parse_line(line)) == []
    assert set(codes(parse_line(line.replace(b"<|im_end|>", b"<|im_end|> ")))) == {"special_token_in_text"}
    asked = parsed(("user", "What is it?<|im_end|>"), ("assistant", "It ends a turn of mine.<|im_end|>"))
    assert codes(asked) == ["special_token_in_text"] * 2


def test_empty_and_tiny_answers_are_found():
    assert codes(parsed(("user", "Hi"), ("assistant", " \n"))) == ["empty_answer"]
    assert codes(parsed(("user", "Hi"), ("assistant", "\u200b\ufeff\u00ad"))) == ["empty_answer"]
    assert codes(parsed(("user", "Hi"), ("assistant", "🙂 ok"))) == []
    assert codes(parsed(("user", "Hi"), ("assistant", "a"))) == ["tiny_answer"]
    assert codes(parse_line(b'{"prompt": "a", "completion": " "}')) == ["empty_answer"]


@pytest.mark.parametrize(("answer", "code"), [(" \n", "empty_answer"), ("a", "tiny_answer")])
def test_every_trained_answer_is_looked_at(answer, code):
    more = ("user", "And now?"), ("assistant", "How can I help you?")
    row = parsed(("user", "Hi"), ("assistant", answer), *more)
    assert codes(row) == [code]
    (found,) = tokenise_rows(tokenizer(), [row], RenderOptions(4096))
    assert isinstance(found, Tokenised)
    (finding,) = RowChecks(tokenizer()).check(7, row, found)
    assert finding.field == ("messages[1].content" if code == "empty_answer" else "")
    messages = [
        {"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", answer), *more)
    ]
    messages[1]["weight"] = 0
    assert codes(parse_line(json.dumps({"messages": messages}).encode())) == []


def test_a_model_without_end_of_text_is_found():
    made = Tokenizer.from_files(tiny_tokenizer_json().encode(), {})
    row = parse_line(b'{"prompt": "a", "completion": "How can I help you?"}')
    (found,) = tokenise_rows(made, [row], RenderOptions(4096))
    assert isinstance(found, Tokenised)
    assert [finding.code for finding in RowChecks(made).check(1, row, found)] == ["stop_not_trained"]


def test_the_prompt_of_a_pair_is_read_once():
    output = [{"role": "assistant", "content": "b"}]
    row = {
        "input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": output,
        "non_preferred_output": [{"role": "assistant", "content": "c"}],
    }
    assert [text for _, text in texts_of(parse_line(json.dumps(row).encode()))] == ["a", "b", "c"]


KEY = "AKIA" + "ABCD" * 4


def call_of(value: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": json.dumps(value)}}


def fields_of(row: TrainingRow) -> list[tuple[str, str]]:
    made = tokenizer(REAL["qwen"])
    (found,) = tokenise_rows(made, [row], RenderOptions(4096))
    assert isinstance(found, Tokenised)
    wanted = {"secret", "email", "special_token_in_text"}
    return [(each.field, each.code) for each in RowChecks(made).check(1, row, found) if each.code in wanted]


def test_secrets_in_calls_and_tools_are_found():
    described = {"name": "get_weather", "description": f"With {KEY}.", "parameters": {"enum": ["<|im_end|>"]}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [CALL, call_of({"to": [{"mail": "joe@lathe.dev"}]})]},
    ]
    row = parse_line(
        json.dumps({"messages": messages, "tools": [{"type": "function", "function": described}]}).encode()
    )
    assert fields_of(row) == [
        ("messages[1].tool_calls[1].function.arguments.to[0].mail", "email"),
        ("tools[0].function.description", "secret"),
        ("tools[0].function.parameters.enum[0]", "special_token_in_text"),
    ]


def test_the_language_is_that_of_what_is_said():
    long = "Wir haben heute leider keine Karten mehr, kommen Sie doch morgen wieder zu uns."
    call = call_of({"text": "The weather of today and of tomorrow in the city of London is what I want."})
    messages = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": long, "tool_calls": [call] * 3},
    ]
    assert language_of_row(parse_line(json.dumps({"messages": messages, "tools": TOOLS}).encode())) == "de"


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_text_is_checked(turns):
    row = parsed(*[turn for u, a in turns for turn in (("user", u), ("assistant", a))])
    codes(row)


def test_languages():
    german = "Ich möchte gern wissen, wann meine Bestellung endlich bei mir ankommt."
    assert language_of(german) == "de"
    assert language_of("My order has not arrived yet. Please tell me where it is now.") == "en"
    assert language_of("42") == language_of("") == "und"
    assert language_of_row(parsed(("user", german), ("assistant", "ok"))) == "de"
