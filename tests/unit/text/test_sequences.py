"""Rows of every format as tokens: what is trained, and what becomes of a row that is too long."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.errors import RowError
from lathe.text.formats import Role
from lathe.text.render import Example, RenderOptions, render_prompt
from lathe.text.rows import parse_line
from lathe.text.sequences import Tokenised, split, tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.rendering import trained_text
from tests.fixtures.templates import ENDS, REAL
from tests.fixtures.tiny import tiny_tokenizer_json
from tests.unit.text.test_render import CONTENT, FAMILIES, merged_newlines

OPTIONS = RenderOptions(context_limit=4096)
NOW = datetime(2030, 1, 2)


def tokenise(tokenizer: Tokenizer, row: dict[str, Any], options: RenderOptions = OPTIONS) -> Tokenised:
    (found,) = tokenise_rows(tokenizer, [parse_line(json.dumps(row).encode())], options, now=NOW)
    if isinstance(found, RowError):
        raise found
    return found


def examples(found: Tokenised) -> list[Example]:
    return [example for _, example in found.sequences]


def pair(user: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": user}]},
        "preferred_output": [{"role": "assistant", "content": chosen}],
        "non_preferred_output": [{"role": "assistant", "content": rejected}],
    }


def with_bos(tokenizer_json: str) -> Tokenizer:
    """The tiny tokenizer, putting a bos before each text as Llama's and Gemma's do."""
    content = json.loads(tokenizer_json)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Tokenizer.from_files(json.dumps(content).encode(), config, REAL["smollm2"])


def test_a_pair_trains_both_outputs_with_their_end_and_no_prompt(tokenizer: Tokenizer) -> None:
    found = tokenise(tokenizer, pair("hi", "Hello.", "No."))
    assert [role for role, _ in found.sequences] == [Role.CHOSEN, Role.REJECTED]
    assert found.rows == 1 and not found.truncated
    assert [trained_text(tokenizer, example) for example in examples(found)] == [
        ["Hello.<|im_end|>"],
        ["No.<|im_end|>"],
    ]


@given(user=CONTENT, chosen=CONTENT, rejected=CONTENT, name=st.sampled_from(sorted(REAL)))
def test_both_prompts_of_a_pair_are_the_prompt_of_inference(
    user: str, chosen: str, rejected: str, name: str
) -> None:
    tokenizer = FAMILIES[name]
    row = pair(user, chosen, rejected)
    try:
        found = tokenise(tokenizer, row)
    except RowError as error:
        # A template may strip what made the outputs differ, or the parser may see that they do not.
        assert error.code == "identical_outputs"
        return
    prompt = render_prompt(tokenizer, row["input"]["messages"], now=NOW)
    for example in examples(found):
        assert example.tokens[: len(prompt)] == prompt
        assert example.mask[: len(prompt) + 1] == bytes(len(prompt)) + b"\1"
        assert trained_text(tokenizer, example)[0].endswith(ENDS[name])


def test_an_output_whose_edge_is_unstable_leaves_the_prompt_as_it_is() -> None:
    tokenizer = merged_newlines()
    chosen, rejected = examples(tokenise(tokenizer, pair("hi", "\n", "x")))
    assert not chosen.boundary_stable and rejected.boundary_stable
    edge = chosen.mask.index(1)
    assert chosen.tokens[:edge] == rejected.tokens[:edge]


def test_a_pair_that_is_too_long_is_cut_at_the_end_of_both(tokenizer: Tokenizer) -> None:
    row = pair("hi", "one two three four five six seven", "eight nine ten eleven twelve")
    whole = examples(tokenise(tokenizer, row))
    limit = whole[0].mask.index(1) + 2
    found = tokenise(tokenizer, row, RenderOptions(limit))
    assert [example.tokens for example in examples(found)] == [example.tokens[:limit] for example in whole]
    assert found.truncated == sum(len(example.tokens) - limit for example in whole)
    with pytest.raises(RowError) as caught:
        tokenise(tokenizer, row, RenderOptions(limit - 2))
    assert (caught.value.code, caught.value.field) == ("nothing_trained", "preferred_output")
    with pytest.raises(RowError) as caught:
        tokenise(tokenizer, row, RenderOptions(limit, truncation="error"))
    assert (caught.value.code, caught.value.field) == ("context_exceeded", "preferred_output")
    with pytest.raises(RowError) as caught:
        tokenise(
            tokenizer, pair("hi", "one two three four five", "one two three four six"), RenderOptions(limit)
        )
    assert (caught.value.code, caught.value.field) == ("identical_outputs", "non_preferred_output")


def test_a_labelled_answer(tokenizer: Tokenizer) -> None:
    messages = pair("hi", "Hello.", "x")["input"]["messages"] + [{"role": "assistant", "content": "Hello."}]
    found = tokenise(tokenizer, {"messages": messages, "label": False})
    ((role, example),) = found.sequences
    assert (role, trained_text(tokenizer, example)) == (Role.UNDESIRABLE, ["Hello.<|im_end|>"])


def test_a_completion_is_tokenised_behind_its_prompt_and_ends(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenise(tokenizer, {"prompt": "The capital is", "completion": " Paris."}))
    prompt = tokenizer.encode("The capital is")
    assert example.tokens[: len(prompt)] == prompt
    assert trained_text(tokenizer, example) == [" Paris.<|im_end|>"]


def test_an_end_that_the_text_has_already_is_not_doubled(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenise(tokenizer, {"prompt": "a", "completion": "b<|im_end|>c<|im_end|>"}))
    assert trained_text(tokenizer, example) == ["b<|im_end|>c<|im_end|>"]


def test_a_text_is_trained_but_for_its_first_token(tokenizer: Tokenizer) -> None:
    (example,) = examples(tokenise(tokenizer, {"text": "Hello, how are you?"}))
    ids = tokenizer.encode("Hello, how are you?")
    assert example.tokens == [*ids, tokenizer.eos_id]
    assert example.mask == b"\0" + b"\1" * len(ids)


def test_a_bos_is_put_where_the_tokenizer_does_so() -> None:
    tokenizer = with_bos(tiny_tokenizer_json())
    assert tokenizer.document_prefix == (0,)
    (text,) = examples(tokenise(tokenizer, {"text": "Hello"}))
    assert text.tokens == [*tokenizer.encode("Hello", add_special_tokens=True), tokenizer.eos_id]
    assert text.mask == b"\0" + b"\1" * (len(text.tokens) - 1)
    (answer,) = examples(tokenise(tokenizer, {"prompt": "Hello", "completion": " you"}))
    assert answer.tokens[0] == 0 and trained_text(tokenizer, answer) == [" you<|im_end|>"]


def test_a_base_without_a_chat_template_takes_texts() -> None:
    config = {"eos_token": "<|endoftext|>"}
    tokenizer = Tokenizer.from_files(tiny_tokenizer_json().encode(), config)
    assert examples(tokenise(tokenizer, {"text": "Hello"}))[0].tokens[-1] == 0
    with pytest.raises(RowError) as caught:
        tokenise(tokenizer, pair("hi", "a", "b"))
    assert caught.value.code == "template_error"


@given(size=st.integers(2, 40), limit=st.integers(2, 12))
def test_split_rows_train_each_token_once(size: int, limit: int) -> None:
    whole = Example(list(range(size)), b"\0" + b"\1" * (size - 1), 0, size - 1, True)
    rows = list(split(whole, limit))
    assert all(2 <= len(row.tokens) <= limit and len(row.mask) == len(row.tokens) for row in rows)
    assert [token for row in rows for token, mark in zip(row.tokens, row.mask, strict=True) if mark] == list(
        range(1, size)
    )
    for row in rows:
        assert row.tokens == list(range(row.tokens[0], row.tokens[0] + len(row.tokens)))


def test_a_text_longer_than_the_limit(tokenizer: Tokenizer) -> None:
    row = {"text": "One two three four five six seven eight nine ten."}
    (whole,) = examples(tokenise(tokenizer, row))
    found = tokenise(tokenizer, row, RenderOptions(8))
    assert found.rows == len(found.sequences) > 1 and found.was_split and not found.truncated
    assert sum(example.trained_tokens for example in examples(found)) == whole.trained_tokens
    with pytest.raises(RowError) as caught:
        tokenise(tokenizer, row, RenderOptions(8, truncation="error"))
    assert (caught.value.code, caught.value.field) == ("context_exceeded", "text")
