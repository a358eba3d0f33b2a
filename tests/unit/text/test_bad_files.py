"""Nothing that a file holds gives anything but a report: its lines, stable codes, bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.findings import KINDS
from lathe.text.jsonl import Report, Validator

ROW = json.dumps(
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]},
    ensure_ascii=False,
).encode()
GOOD = (ROW + b"\n") * 12


def report(chunks: Iterator[bytes] | list[bytes], **options: int) -> Report:
    validator = Validator(**options)
    for chunk in chunks:
        validator.feed(chunk)
    return validator.finish()


def deep(brackets: tuple[bytes, bytes], depth: int = 10_000) -> bytes:
    return b'{"tools": ' + brackets[0] * depth + b"1" + brackets[1] * depth + b"}"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (ROW.replace("é".encode(), b"\xe9"), "invalid_utf8"),
        (ROW.replace("é".encode(), b"\xed\xa0\x80"), "invalid_utf8"),
        (ROW.replace("é".encode(), b"\\ud83d"), "invalid_utf8"),
        (ROW.replace("é".encode(), b"\x00"), "invalid_json"),
        (b"\x00" * 50, "invalid_json"),
        (ROW.replace("é".encode(), b"\x1f"), "invalid_json"),
        (ROW[:-1], "invalid_json"),
        (ROW + ROW, "invalid_json"),
        (b'{"messages": NaN}', "invalid_json"),
        (b'{"messages": [], "x": -Infinity}', "invalid_json"),
        (b'{"messages": 1e999}', "invalid_json"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"\xef\xbb\xbf" + ROW, "invalid_json"),
        (b"[" * 10_000, "invalid_json"),
        (deep((b"[", b"]")), "invalid_json"),
        (deep((b'{"a":', b"}")), "invalid_json"),
        (ROW[:-1] + b', "tools": ' + b"[" * 500 + b"]" * 500 + b"}", "invalid_tools"),
        (b"null", "data_type"),
        (b'"' + ROW.replace(b'"', b'\\"') + b'"', "data_type"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_good(line: bytes, code: str) -> None:
    found = report([GOOD, line + b"\n", GOOD])
    assert [(finding.line, finding.code) for finding in found.findings] == [(13, code)]
    assert (found.rows, found.examples) == (25, 24)
    assert code in KINDS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ROW.replace("é".encode(), b"\x00"),
            "the line is not JSON: Invalid control character at character 44 of 87",
        ),
        (ROW[:-20] + b"\n", "the line is not JSON: Unterminated string starting at character"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "the line is not JSON: a number has too many digits"),
        (
            b"\r".join([ROW] * 3),
            "the line is not JSON: it has lines that end with CR alone; end each with LF",
        ),
    ],
)
def test_what_is_wrong_is_said_in_words_for_people(line: bytes, words: str) -> None:
    assert report([GOOD, line]).findings[0].message.startswith(words)


def test_of_equal_keys_the_last_wins_and_line_ends_do_not_matter() -> None:
    twice = b'{"messages": 7, ' + ROW[1:]
    windows = (twice + b"\r\n") * 12 + ROW
    assert (report([windows]).valid, report([windows]).examples) == (True, 13)


def test_a_tools_schema_that_nests_deeply_but_is_json_is_refused() -> None:
    schema = b'{"a":' * 300 + b"1" + b"}" * 300
    tool = b'{"type": "function", "function": {"name": "f", "parameters": ' + schema + b"}}"
    found = report([GOOD, ROW[:-1] + b', "tools": [' + tool + b"]}\n"])
    assert [(finding.line, finding.code) for finding in found.findings] == [(13, "too_deep")]


@pytest.mark.parametrize("ended", [True, False])
def test_a_line_of_a_gigabyte_takes_no_memory(ended: bool) -> None:
    chunk = b"x" * (1 << 20)
    tracemalloc.start()
    try:
        found = report([GOOD, *repeat(chunk, 1024), b"\n" * ended, GOOD])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.findings[0].line == 13 and found.findings[0].code == "line_too_long"
    assert found.examples == (24 if ended else 12 + 11)
    assert peak < 64 << 20


def test_a_file_of_nothing_but_bad_lines_is_given_up() -> None:
    found = report(repeat(b"x\n" * 100_000, 20))
    assert (found.rows, found.finding_count, len(found.findings)) == (10_000, 10_001, 20)
    assert {group.code for group in found.groups} == {"invalid_json", "too_many_errors"}


def test_a_key_of_megabytes_is_not_repeated_in_the_report() -> None:
    key = b"k" * (4 << 20)
    unused = b'{"text": "a", "' + key + b'": 1}\n'
    unknown = b'{"messages": [{"role": "' + key + b'", "' + key + b'": 1}]}\n'
    found = report([unused * 12, unknown])
    assert {finding.code for finding in found.findings} == {"unused_keys", "unrecognized_role"}
    assert sum(len(finding.field) + len(finding.message) for finding in found.findings) < 2000


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with bytes changed, put in and taken out, perhaps cut."""
    content = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 8))
        content[place : place + length] = draw(
            st.binary(max_size=4)
            | st.sampled_from(
                [
                    b"\n",
                    b"\r\n",
                    b"\x00",
                    b'"',
                    b"\\",
                    b"\\ud800",
                    b"{",
                    b"]",
                    b"1e999",
                    b"NaN",
                    b",",
                    b"\xff",
                ]
            )
        )
    return bytes(content)


@given(content=damaged(), chunk=st.integers(1, 400))
def test_a_damaged_file_gives_a_report_that_does_not_depend_on_chunks(content: bytes, chunk: int) -> None:
    found = report(
        [content[begin : begin + chunk] for begin in range(0, len(content), chunk)], max_line_bytes=200
    )
    assert found == report([content], max_line_bytes=200)
    assert found.valid or found.findings
    for finding in found.findings:
        assert finding.code in KINDS and 0 <= finding.line <= content.count(b"\n") + 1
