"""The fast decoder and the exact one are one: whatever the bytes, the same value or the same refusal."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lathe.text import decoding
from lathe.text.chat import parse_turns
from lathe.text.decoding import check_depth, decode_json
from lathe.text.errors import RowError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b",", b":", b'"', b'"a"', b'"a":1,', b"\\u0041", b"\\ud800", b"\\udc00", b"\\x", b"0",
     b"-0", b"01", b"1.", b"1e5", b"1e999", b"-1e999", b"1e-999", b"123456789012345678901", b"NaN", b"-Infinity",
     b"true", b"null", b" ", b"\t", b"\r", b"\x00", b"\x0c", b"\x1f", b"\x7f", b"\xff", b"\xed\xa0\x80", "é😀".encode(),
     b"\xef\xbb\xbf", b"/*", b"'"]
)  # fmt: skip


def outcome(line: bytes, decode: Any) -> object:
    try:
        return repr(decode(line))
    except RowError as error:
        return (error.code, error.field, error.detail)


@given(line=JSON.map(lambda value: json.dumps(value).encode()) | st.lists(PIECES, max_size=9).map(b"".join))
@example(b'{"a": 1, "a": 2}')
@example(b"9" * 5000)
@example(b"[" * 2000 + b"]" * 2000)
def test_the_fast_decoder_gives_what_the_exact_one_gives(line: bytes) -> None:
    assert outcome(line, decode_json) == outcome(line, decoding._decode_exactly)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"a": 1e999}', "invalid_json", "the number 1e999 is too large"),
        (b'{"a": NaN}', "invalid_json", "NaN is not a JSON number"),
        (b'{"a": "\x00"}', "invalid_json", "control character"),
        (b"  {", "invalid_json", "write each object on one line"),
        (b'{"a": 1},', "invalid_json", "a comma follows the object"),
        (b'{"a": 1', "invalid_json", "at its end"),
        (b'{"a": 1}, {}', "invalid_json", "at character 9 of 12"),
        (b"[" * 10_000, "invalid_json", "nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "invalid_json", "nested too deeply"),
        (b'{"a": "\xff"}', "invalid_utf8", "byte 8 of the line"),
        (b'{"a": ["\\ud800"]}', "invalid_utf8", "surrogate"),
    ],
)
def test_what_is_no_json_is_said(line: bytes, code: str, words: str) -> None:
    with pytest.raises(RowError, match=words) as caught:
        decode_json(line)
    assert caught.value.code == code


def test_of_equal_keys_the_last_wins() -> None:
    assert decode_json(b'{"a": 1, "b": 2, "a": 3}') == {"a": 3, "b": 2}


def test_depth_is_bounded_and_width_is_not() -> None:
    deep: Any = []
    for _ in range(99):
        deep = [deep]
    check_depth([list(range(1000))] * 3, "x")
    check_depth(deep, "x")
    with pytest.raises(RowError) as caught:
        check_depth([deep], "tools")
    assert (caught.value.code, caught.value.field) == ("too_deep", "tools")


MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "weight"]),
    st.sampled_from(
        ["system", "developer", "user", "assistant", "tool", "function", "", "x", None, 0, 1, []]
    ),
    max_size=3,
)


@given(message=MESSAGE)
def test_a_plain_message_is_what_the_full_check_makes_of_it(message: dict[str, Any]) -> None:
    """The shortcut for messages of role and text never takes or changes one that the full check would not."""
    spelled_out = {**message, "name": None} if "name" not in message else message
    results = []
    for given_message in (message, spelled_out):
        try:
            results.append(parse_turns([given_message], "messages"))
        except RowError as error:
            results.append((error.code, error.field))
    assert results[0] == results[1]


def test_what_an_error_quotes_is_cut() -> None:
    error = RowError("k" * 10_000, "message_unrecognized_key", "unknown " + "x" * 10_000)
    assert (len(error.field), len(error.detail)) == (200, 500)


def test_another_process_is_told_the_same_error() -> None:
    error = RowError("messages[2]", "missing_content", "is missing " + "x" * 10_000)
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is RowError
    assert vars(sent) == vars(error)
    assert str(sent) == str(error)
