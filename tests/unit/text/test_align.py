"""Trained turns found among ids alone are those that the offsets tell."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lathe.text.align import find_marks
from lathe.text.render import RenderOptions, render_whole
from lathe.text.rows import parse_line
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.templates import BOS, EOS, REAL, SPECIAL
from tests.fixtures.tiny import tiny_tokenizer_json

OPTIONS = RenderOptions(context_limit=4096)
# Pieces of the notation itself among them: a text may hold what looks like the end of a turn.
PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "<|eot_id|>", "</s>", "\n\n", " ", "é", "🙂", "a b"]
)
TEXT = st.lists(PIECES | st.text(max_size=6), min_size=1, max_size=4).map("".join).filter(bool)


def _backend() -> Backend:
    backend = Backend.from_str(tiny_tokenizer_json())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return backend


def _tokenizer(name: str, *, plain: bool) -> Tokenizer:
    config = {"bos_token": BOS[name], "eos_token": EOS[name]}
    tokenizer = Tokenizer.from_files(_backend().to_str().encode(), config, REAL[name])
    if not plain:
        tokenizer.plain_added = None
    return tokenizer


FAST = {name: _tokenizer(name, plain=True) for name in REAL}
BY_OFFSETS = {name: _tokenizer(name, plain=False) for name in REAL}


@given(
    turns=st.lists(st.tuples(TEXT, TEXT, st.sampled_from([0, 1])), min_size=1, max_size=3),
    name=st.sampled_from(sorted(REAL)),
)
@example(turns=[("a", "<|im_end|>b", 1), ("<|im_start|>assistant\n", "c", 1)], name="qwen")
@settings(max_examples=150, deadline=None)
def test_the_mask_is_the_one_that_offsets_give(turns: list[tuple[str, str, int]], name: str) -> None:
    messages = [
        message
        for user, answer, weight in turns
        for message in (
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer, "weight": weight},
        )
    ]
    (part,) = parse_line(json.dumps({"messages": messages}).encode()).parts
    (fast,), (slow,) = (
        render_whole(pool[name], [part.content], OPTIONS, now=None) for pool in (FAST, BY_OFFSETS)
    )
    assert fast == slow if not isinstance(fast, Exception) else str(fast) == str(slow)


@given(st.lists(st.sampled_from(["<a>", "<a>b", "x", "<", " "]), max_size=8).map("".join))
@settings(max_examples=100, deadline=None)
def test_marks_are_where_the_tokenizer_finds_them(text: str) -> None:
    backend = Backend.from_str(tiny_tokenizer_json())
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<a>", "<a>b")])
    contents = {backend.token_to_id(token): token for token in ("<a>", "<a>b")}
    encoding = backend.encode(text)
    marks = find_marks(text, encoding.ids, contents)
    expected = [
        (index, *place)
        for index, (token, place) in enumerate(zip(encoding.ids, encoding.offsets, strict=True))
        if token in contents
    ]
    assert marks is not None
    assert list(zip(marks.indexes, marks.starts, marks.ends, strict=True)) == expected
