"""A text in pieces has the tokens of the whole, whatever the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lathe.text.pieces import PREPENDED, SIZE, SPACES, WORDS, Places, grouped, longest, places_of
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.tiny import SPECIAL_TOKENS, tiny_tokenizer_json

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTE_LEVEL, "use_regex": False}
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(expression: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return sequence({**step, **changes}, PLAIN_BYTES)


LLAMA3 = split(rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}")
KNOWN: dict[str, dict[str, Any]] = {
    "gpt2": {"pre_tokenizer": BYTE_LEVEL},
    "smollm": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)},
    "llama3": {"pre_tokenizer": LLAMA3},
    "qwen": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": split(rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"),
    },
    "o200k": {"pre_tokenizer": split(O200K)},
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@cache
def sentence_model() -> dict[str, Any]:
    """BPE with byte fallback that has seen spaces as U+2581, as Llama 2's, Mistral's and Gemma's have."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL_TOKENS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(
        [
            "it's a fox, end of the end.",
            "a fox and 12 fox in york",
            "new york 12 12",
            "a b a b",
            "Hello Hello",
        ]
        * 3,
        trainer,
    )
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    assert len(model["merges"]) > 20
    return model


SENTENCES: dict[str, tuple[Places, dict[str, Any]]] = {
    "llama2": (PREPENDED, {"normalizer": PREPEND, "pre_tokenizer": None}),
    "gemma": (
        SPACES,
        {
            "normalizer": REPLACE,
            "pre_tokenizer": {
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
            },
        },
    ),
    "metaspace first": (SPACES, {"pre_tokenizer": METASPACE}),
    "metaspace always": (SPACES, {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}}),
    "metaspace never, split": (SPACES, {"pre_tokenizer": {**METASPACE, "prepend_scheme": "never", "split": True}}),
}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "sentencepiece": {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
    },
    "metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
    "metaspace later": {
        "pre_tokenizer": sequence(
            BYTE_LEVEL, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
        )
    },
    "lower case": {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": BYTE_LEVEL},
    "takes the space with the letter": {"pre_tokenizer": split(r"\p{L}+ |\s+")},
    "looks behind": {"pre_tokenizer": split(r"(?<=a)\s+|\s+")},
    "leaves other characters between": {"pre_tokenizer": split(r"\p{N}+|\s+")},
    "leaves white space between": {"pre_tokenizer": split(r"\p{N}+")},
    "merged with what precedes": {"pre_tokenizer": split(r"\s+", behavior="MergedWithPrevious")},
    "bytes first": {"pre_tokenizer": sequence(PLAIN_BYTES, BYTE_LEVEL)},
    "prefix": {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
}  # fmt: skip
ADDED = {
    "takes white space behind it": AddedToken("end", rstrip=True, normalized=False),
    "has such a place": AddedToken("new york", normalized=False),
    "asks what stands before it": AddedToken(" foo", single_word=True, normalized=False),
    "has it once normalised": AddedToken("cafe\u0301 noir", normalized=True),
}

PARTS = [
    "a", "b", "é", "e\u0301", "'s", "'", " ", "  ", "\n", "\r", "\t", "\u00a0", "1", "½", ".", "/", "你", "ſ",
    "。", "，", "<|im_end|>", "end", "york", " Hello", " fox",
    "12", "_", "(", ":", "{", "\u0308", "\u0663", "²", "\x1c", "\u3000",
    # Letters that NFC makes a letter and a mark.
    "\u095d", "\ufb2a",
]  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.characters(codec="utf-8"), max_size=40).map("".join)


def content(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {**json.loads(tiny_tokenizer_json()), **parts}


def cut(text: str, size: int = SIZE) -> list[str]:
    return list(WORDS.cut(text, size))


def sentence_content(name: str) -> dict[str, Any]:
    return content({"normalizer": None, "model": sentence_model(), **SENTENCES[name][1]})


@cache
def sentences(name: str) -> Tokenizer:
    return Tokenizer.from_files(json.dumps(sentence_content(name)).encode(), {})


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_files(json.dumps(content(KNOWN[name])).encode(), {})


@pytest.mark.parametrize("name", KNOWN)
@given(text=texts)
def test_the_pieces_have_the_tokens_of_the_whole(name: str, text: str) -> None:
    one = tokenizer(name)
    assert places_of(content(KNOWN[name]), ()) == WORDS
    assert "".join(cut(text, 1)) == text
    assert [id_ for piece in cut(text, 1) for id_ in one.encode(piece)] == one.encode(text)


@pytest.mark.parametrize("name", SENTENCES)
@given(text=texts)
def test_pieces_of_sentences_have_the_tokens_of_the_whole(name: str, text: str) -> None:
    places, _ = SENTENCES[name]
    one = sentences(name)
    assert places_of(sentence_content(name), ()) == places
    cut = places.cut(text, 1)
    assert [id_ for piece in cut for id_ in one.encode(piece)] == one.encode(text)


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, SPACES),
        ({"merges": [["▁", "▁"], ["▁▁", "▁a"]]}, SPACES),
        ({"merges": ["b ▁"]}, None),
        ({"merges": [["▁", "a"], ["a", "▁a"]]}, None),
        ({"ignore_merges": True}, None),
        ({"dropout": 0.1}, None),
        ({"end_of_word_suffix": "</w>"}, None),
        ({"vocab": {"a": 0}}, None),
        ({"type": "Unigram"}, None),
    ],
)
def test_a_model_may_reach_over_a_space(changes: Mapping[str, Any], places: Places | None) -> None:
    changed = {**sentence_content("gemma"), "model": {**sentence_model(), **changes}}
    assert places_of(changed, ()) == places


@pytest.mark.parametrize("text", ["foo", "<end", "end>", "<a b>", "<a▁b>", "▁foo"])
def test_an_added_token_may_touch_a_word(text: str) -> None:
    """What stands before or behind one is a text of its own, before which U+2581 is put."""
    assert places_of(sentence_content("llama2"), [AddedToken(text, normalized=False)]) is None
    assert places_of(sentence_content("llama2"), [AddedToken("<a>"), AddedToken("▁▁")]) == PREPENDED


def test_long_sentences_are_tokenised_in_pieces() -> None:
    one = sentences("llama2")
    long = "a fox in new york, 12 <|im_end|> of  it's end" * (SIZE // 40)
    (whole,) = one.encode_spans([long])
    assert one.encode_batch([long]) == [whole.ids]
    assert one.whole_bytes(long * 4) < 2 * SIZE
    starts, ends = one.offsets(long)
    exact = sum(
        pair == found for pair, found in zip(zip(starts, ends, strict=True), whole.offsets, strict=True)
    )
    assert len(starts) - exact <= 2


@pytest.mark.parametrize("name", KNOWN)
def test_long_texts_are_tokenised_in_pieces(name: str) -> None:
    one = tokenizer(name)
    long = "It's the café's 12 345th fox;\n\n jumps  over <|im_end|>" * (SIZE // 50 + 100)
    assert len(cut(long)) > 1
    texts = ["Hello", long, "", "a b"]
    whole = one.encode_spans(texts)
    assert one.encode_batch(texts) == [encoding.ids for encoding in whole]
    starts, ends = one.offsets(long)
    assert list(zip(starts, ends, strict=True)) == whole[1].offsets


@pytest.mark.parametrize("parts", WHOLE.values(), ids=WHOLE)
def test_what_is_not_known_to_have_edges_is_not_cut(parts: Mapping[str, Any]) -> None:
    assert places_of(content(parts), ()) is None


@pytest.mark.parametrize("token", ADDED.values(), ids=ADDED)
def test_an_added_token_may_reach_over_an_edge(token: AddedToken) -> None:
    assert places_of(content(KNOWN["qwen"]), [AddedToken("<|end|>"), token]) is None
    assert places_of(content(KNOWN["qwen"]), [AddedToken("<|end|>"), AddedToken("  ")]) == WORDS


def test_no_edge_is_behind_what_normalising_makes_a_mark() -> None:
    """Hindi's rha is a letter and a mark under NFC, and a mark is one word with the line break behind it."""
    assert cut("\u092a\u095d\na\n", 1) == ["\u092a\u095d\na", "\n"]
    assert cut("\u095d\n", 1) == ["\u095d\n"]


def test_a_text_without_places_stays_whole() -> None:
    assert list(cut("你好" * 20, 4)) == ["你好" * 20]
    assert cut("a b", 1) == ["a", " b"]
    assert cut("你好，世界。\n再见", 1) == ["你好", "，世界", "。\n再见"]
    assert cut("", 1) == [""]


def test_numbers_tables_and_code_have_places() -> None:
    assert cut("0.51 2 7\n3", 1) == ["0.51", " 2", " 7", "\n3"]
    assert cut('{"a": [1, "b"],\n "c"} x', 1) == ['{"a":', " [1,", ' "b"],\n "c"}', " x"]
    assert longest(cut("0.51 2 7é\n3", 1)) == 4
    assert longest(()) == 0


def test_groups_are_of_so_many_characters() -> None:
    pieces = [(0, "abc"), (1, ""), (1, "d"), (2, "efghij"), (3, "k")]
    assert list(grouped(pieces, 4)) == [pieces[:3], pieces[3:4], pieces[4:]]
    assert list(grouped([], 4)) == []
