"""What is left of rows that are too long: it fits, and nothing is torn apart."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.chat import Chat
from lathe.text.parts import Plain, TrainingRow
from lathe.text.render import RenderOptions
from lathe.text.rows import parse_row
from lathe.text.shortening import Policy, excess_tokens, shorten
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import tiny_tokenizer_config, tiny_tokenizer_json

TINY = Tokenizer.from_files(tiny_tokenizer_json().encode(), tiny_tokenizer_config())
NOW = datetime(2030, 1, 2)
# Roles refer to each other as in any chat: a call is answered by the tool, an answer follows a question.
EXCHANGES = (("user", "assistant"), ("user", "user", "assistant"), ("user", "assistant", "tool", "assistant"))
TEXTS = st.text("ab \nü🙂", min_size=1, max_size=30)


def said(role: str, content: str, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*turns: dict[str, Any]) -> TrainingRow:
    return parse_row({"messages": list(turns)})


def size(row: TrainingRow) -> int:
    return excess_tokens(TINY, row, RenderOptions(0), NOW)


def shortened(row: TrainingRow, limit: int, policy: Policy = Policy.DROP_OLDEST) -> TrainingRow | None:
    """The row itself where it fits."""
    options = RenderOptions(limit)
    excess = excess_tokens(TINY, row, options, NOW)
    return row if excess <= 0 else shorten(TINY, row, options, policy, excess=excess, now=NOW)


def content(row: TrainingRow | None, part: int = 0) -> Any:
    assert row is not None
    return row.parts[part].content


LONG = [
    said("system", "Be brief."),
    *(turn for n in range(6) for turn in (said("user", f"Question {n}?"), said("assistant", f"Answer {n}."))),
]


def test_a_chat_loses_its_oldest_exchanges_and_keeps_its_system_message() -> None:
    row = chat(*LONG)
    for kept in range(1, 6):
        wanted = chat(LONG[0], *LONG[-2 * kept :])
        assert shortened(row, size(wanted)) == wanted
        assert shortened(row, size(wanted) + 1) == wanted
    assert shortened(row, size(chat(LONG[0], *LONG[-2:])) - 1) is None


def test_or_its_last_turns() -> None:
    row = chat(*LONG)
    for kept in range(1, 6):
        wanted = chat(*LONG[: 1 + 2 * kept])
        assert shortened(row, size(wanted), Policy.CUT_END) == wanted
    assert shortened(row, size(chat(*LONG[:3])) - 1, Policy.CUT_END) is None


def test_the_last_trained_turn_stays_whatever_follows_it() -> None:
    turns = [*LONG[:5], said("user", "Enough?"), said("assistant", "Yes.", weight=0), said("user", "Bye.")]
    row = chat(*turns)
    wanted = chat(turns[0], *turns[3:])
    assert shortened(row, size(wanted)) == wanted
    assert shortened(row, size(wanted) - 1) is None


def test_questions_asked_in_two_turns_stay_together() -> None:
    turns = [*LONG[:3], said("user", "One thing."), said("user", "What is it?"), said("assistant", "This.")]
    wanted = chat(turns[0], *turns[3:])
    assert shortened(chat(*turns), size(wanted)) == wanted
    assert shortened(chat(*turns), size(wanted) - 1) is None


def test_no_row_is_shortened_where_rows_are_to_be_dropped() -> None:
    assert shortened(chat(*LONG), 20, Policy.DROP_ROW) is None


def test_both_answers_of_a_pair_keep_one_prompt() -> None:
    prompt, good, bad = LONG[:-1], said("assistant", "Answer 5."), said("assistant", "I do not know, sorry.")

    def pair(prompt: list[dict[str, Any]]) -> TrainingRow:
        return parse_row(
            {"input": {"messages": prompt}, "preferred_output": [good], "non_preferred_output": [bad]}
        )

    wanted = pair([LONG[0], *prompt[-3:]])
    assert shortened(pair(prompt), size(wanted)) == wanted
    assert shortened(pair(prompt), size(wanted), Policy.CUT_END) is None


def test_texts_are_cut_between_tokens() -> None:
    text = "def main(argument): return argument + 1 🙂 and so on; " * 4
    limit = 40
    for policy, kept in ((Policy.DROP_OLDEST, text.endswith), (Policy.CUT_END, text.startswith)):
        made = shortened(parse_row({"text": text}), limit, policy)
        left = content(made).completion
        assert kept(left)
        assert made is not None and limit - 6 <= size(made) <= limit


def test_of_a_prompt_with_its_completion_the_beginning_or_the_end_goes() -> None:
    row = parse_row({"prompt": "Once upon a time " * 20, "completion": "they lived happily ever after " * 2})
    limit = size(row) - 30
    oldest = content(shortened(row, limit))
    assert row.parts[0].content.prompt.endswith(oldest.prompt) and oldest.prompt
    assert oldest.completion == row.parts[0].content.completion
    newest = content(shortened(row, limit + 20, Policy.CUT_END))
    assert newest.prompt == row.parts[0].content.prompt
    assert row.parts[0].content.completion.startswith(newest.completion)
    assert shortened(row, 10) is None
    assert shortened(row, 10, Policy.CUT_END) is None


@pytest.mark.parametrize("label", [True, False])
def test_an_answer_with_a_verdict_is_never_cut(label: bool) -> None:
    row = parse_row({"prompt": "Why? " * 20, "completion": "Because.", "label": label})
    assert shortened(row, size(row) - 1, Policy.CUT_END) is None
    assert content(shortened(row, size(row) - 10)).completion == "Because."


@st.composite
def chats(draw: st.DrawFn) -> TrainingRow:
    roles = [
        role
        for exchange in draw(st.lists(st.sampled_from(EXCHANGES), min_size=1, max_size=5))
        for role in exchange
    ]
    turns = [said(role, draw(TEXTS)) for role in roles]
    for turn in turns:
        if turn["role"] == "assistant" and draw(st.booleans()):
            turn["weight"] = 0
    next(turn for turn in turns if turn["role"] == "assistant")["weight"] = 1
    system = [said("system", draw(TEXTS))] if draw(st.booleans()) else []
    return chat(*system, *turns)


@given(chats(), st.integers(4, 120), st.sampled_from([Policy.DROP_OLDEST, Policy.CUT_END]))
def test_what_is_left_of_a_chat_fits_and_is_a_whole_of_turns(
    row: TrainingRow, limit: int, policy: Policy
) -> None:
    made = shortened(row, limit, policy)
    if made is None:
        return
    assert size(made) <= limit
    assert shortened(made, limit, policy) == made
    before, after = row.parts[0].content, made.parts[0].content
    assert isinstance(before, Chat) and isinstance(after, Chat)
    head = int(before.messages[0]["role"] == "system")
    turns = list(zip(before.messages, before.weights, strict=True))
    kept = list(zip(after.messages, after.weights, strict=True))
    assert kept[:head] == turns[:head]
    assert kept[head][0]["role"] == "user"
    count = len(kept) - head
    if policy is Policy.DROP_OLDEST:
        assert kept[head:] == turns[len(turns) - count :]
        assert len(turns) - count <= max(place for place, weight in enumerate(before.weights) if weight)
        begin = len(turns) - count
        assert begin == head or turns[begin - 1][0]["role"] != "user"
    else:
        assert kept == turns[: len(kept)]
        assert kept == turns or kept[-1][1] == 1


@given(st.text("ab \nü🙂<|im_end|>", min_size=1, max_size=200), st.integers(3, 60))
def test_what_is_left_of_a_text_fits(text: str, limit: int) -> None:
    row = parse_row({"text": text})
    for policy in (Policy.DROP_OLDEST, Policy.CUT_END):
        made = shortened(row, limit, policy)
        if made is None:
            continue
        left = made.parts[0].content
        assert isinstance(left, Plain) and left.completion
        assert (
            text.endswith(left.completion)
            if policy is Policy.DROP_OLDEST
            else text.startswith(left.completion)
        )
        assert size(made) <= limit
        assert shortened(made, limit, policy) == made
