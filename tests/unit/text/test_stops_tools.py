from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.stops import StopChecker
from lathe.text.template import ChatTemplate
from lathe.text.tools import parse_tool_calls
from tests.fixtures.templates import LLAMA3, MISTRAL, QWEN

QWEN_TEMPLATE, LLAMA_TEMPLATE, PLAIN = ChatTemplate(QWEN), ChatTemplate(LLAMA3), ChatTemplate(MISTRAL)


@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=10),
    stop=st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3),
)
def test_stops_as_if_the_text_so_far_was_searched(pieces: list[str], stop: list[str]) -> None:
    checker, out, seen = StopChecker(stop), "", ""
    for piece in pieces:
        seen += piece
        emitted, stopped = checker.push(piece)
        out += emitted
        assert stopped == any(s in seen for s in stop)
        if stopped:
            assert out == seen[: min(seen.find(s) for s in stop if s in seen)]
            assert checker.flush() == ""
            return
        assert seen.startswith(out)
        held = seen[len(out) :]
        assert not held or any(s.startswith(held) for s in stop)
    assert out + checker.flush() == seen


def named(calls: list[dict[str, object]]) -> list[tuple[str, object]]:
    functions = [call["function"] for call in calls]
    return [(f["name"], json.loads(f["arguments"])) for f in functions if isinstance(f, dict)]


@pytest.mark.parametrize(
    ("text", "template", "content", "calls"),
    [
        ("hello", QWEN_TEMPLATE, "hello", []),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
            QWEN_TEMPLATE,
            None,
            [("f", {"a": "é"})],
        ),
        (
            'I look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>'
            '{"name": "g", "arguments": "{}"}',
            QWEN_TEMPLATE,
            "I look.",
            [("f", {}), ("g", {})],
        ),
        ("<tool_call>{oops}</tool_call>", QWEN_TEMPLATE, "<tool_call>{oops}</tool_call>", []),
        ('{"name": "f", "parameters": {"a": 1}}', LLAMA_TEMPLATE, None, [("f", {"a": 1})]),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
            LLAMA_TEMPLATE,
            None,
            [("f", {}), ("g", {})],
        ),
        ('{"name": "Ann", "age": 3}', LLAMA_TEMPLATE, '{"name": "Ann", "age": 3}', []),
        (
            '{"name": "f", "parameters": {}} and so on',
            LLAMA_TEMPLATE,
            '{"name": "f", "parameters": {}} and so on',
            [],
        ),
        ('{"name": "f", "parameters": {}}', PLAIN, '{"name": "f", "parameters": {}}', []),
    ],
)
def test_tool_calls(
    text: str, template: ChatTemplate, content: str | None, calls: list[tuple[str, object]]
) -> None:
    found_content, found = parse_tool_calls(text, template)
    assert (found_content, named(found)) == (content, calls)
    assert parse_tool_calls(text, template)[1] == found
    assert len({call["id"] for call in found}) == len(found)


@given(st.text('{}[]":,namef \\<>tool_call/', max_size=60))
def test_tool_parsing_never_raises(text: str) -> None:
    for template in (QWEN_TEMPLATE, LLAMA_TEMPLATE):
        content, calls = parse_tool_calls(text, template)
        assert calls or content == text
