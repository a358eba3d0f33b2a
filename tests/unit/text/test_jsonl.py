from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.text.formats import RowFormat
from lathe.text.jsonl import MAX_LINE_BYTES, Line, LineSplitter, Validator

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def split(chunks: list[bytes], max_line_bytes: int = MAX_LINE_BYTES) -> list[Line]:
    splitter = LineSplitter(max_line_bytes)
    return [line for chunk in chunks for line in splitter.feed(chunk)] + list(splitter.finish())


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    chunks = []
    for size in sizes:
        chunks.append(data[:size])
        data = data[size:]
    return [*chunks, data]


@given(
    lines=st.lists(st.binary(max_size=6).map(lambda raw: raw.translate(None, b"\r\n\xef")), max_size=8),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    bom=st.booleans(),
    ended=st.booleans(),
    sizes=st.lists(st.integers(0, 7), max_size=12),
)
def test_lines_do_not_depend_on_chunks(
    lines: list[bytes], newline: bytes, bom: bool, ended: bool, sizes: list[int]
) -> None:
    data = b"\xef\xbb\xbf" * bom + newline.join(lines) + newline * ended
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [(line.number, line.data) for line in split(cut(data, sizes))] == expected


@given(
    lines=st.lists(st.text(" \t\r\f\vx", max_size=9).map(str.encode), min_size=1, max_size=12),
    longest=st.integers(1, 8),
    sizes=st.lists(st.integers(0, 9), max_size=12),
)
def test_blank_lines_are_counted_however_they_are_cut(
    lines: list[bytes], longest: int, sizes: list[int]
) -> None:
    """Against the plain reading of it: split, count, look at each line by itself."""
    expected, offset = list[Line](), 0
    for number, raw in enumerate(lines, 1):
        data, ended = raw.removesuffix(b"\r"), number < len(lines)
        if len(data) > longest:
            expected.append(Line(number, b"", offset, too_long=True, ended=ended))
        elif data.strip():
            expected.append(Line(number, data, offset, ended=ended))
        offset += len(raw) + 1
    assert split(cut(b"\n".join(lines), sizes), longest) == expected


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b" \t\n"])
def test_blank_lines_cost_no_python_each(blank: bytes) -> None:
    """A file of nothing else would hold a validation for half an hour."""
    splitter = LineSplitter()
    with calls_counted() as calls:
        assert list(splitter.feed(ROW + b"\n" + blank * 10_000 + ROW + b"\n"))[1].number == 10_002
    assert sum(calls.values()) < 100


@contextmanager
def calls_counted() -> Iterator[dict[str, int]]:
    """How often functions were called inside, by kind of call."""
    calls = dict[str, int]()

    def count(frame: FrameType, event: str, argument: object) -> None:
        calls[event] = calls.get(event, 0) + 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def test_a_line_that_is_too_long() -> None:
    chunks = [b"ok\n", b"x" * 50, b"x" * 60 + b"\nok"]
    found = [(line.number, line.data, line.too_long) for line in split(chunks, max_line_bytes=100)]
    assert found == [(1, b"ok", False), (2, b"", True), (3, b"ok", False)]
    (longest,) = split([b"x" * 100 + b"\r\n"], max_line_bytes=100)
    assert (longest.data, longest.too_long) == (b"x" * 100, False)


def test_a_good_file() -> None:
    lines = []
    validator = Validator(on_row=lambda line, row: lines.append(line.number))
    validator.feed(b"\xef\xbb\xbf" + (ROW + b"\r\n\n") * 9 + ROW)
    report = validator.finish()
    assert (report.valid, report.examples, report.rows, report.format) == (True, 10, 10, RowFormat.CHAT)
    assert lines == list(range(1, 20, 2))


def test_findings_have_lines_and_the_first_twenty_are_kept() -> None:
    validator = Validator(max_line_bytes=200)
    validator.feed((ROW + b"\n") * 3 + b"x" * 300 + b"\n" + b'{"messages": []}\n' * 30 + ROW[:20])
    report = validator.finish()
    assert (report.examples, report.rows, report.finding_count, len(report.findings)) == (3, 35, 32, 20)
    assert [(f.line, f.code) for f in report.findings[:2]] == [
        (4, "line_too_long"),
        (5, "missing_messages_list"),
    ]


def test_a_file_that_stops_half_way() -> None:
    validator = Validator()
    validator.feed((ROW + b"\n") * 10 + ROW[:30])
    finding = validator.finish().findings[0]
    assert (finding.line, finding.code) == (11, "invalid_json")
    assert finding.message.endswith("the file seems to stop half-way")


def test_a_file_of_another_encoding_does_not_stop_half_way() -> None:
    validator = Validator()
    validator.feed(b"\n".join([b'{"text": "caf\xe9"}'] * 12))
    assert not any("half-way" in finding.message for finding in validator.finish().findings)


@pytest.mark.parametrize(("rows", "count"), [(7, 7), (0, 0)])
def test_too_few_examples(rows: int, count: int) -> None:
    validator = Validator()
    validator.feed((ROW + b"\n") * rows)
    finding = validator.finish().findings[0]
    assert (finding.line, finding.code) == (0, "invalid_n_examples")
    assert finding.message == f"Training file has {count} example(s), but must have at least 10 examples"


def test_a_file_has_one_format() -> None:
    validator = Validator()
    text = b'{"text": "a"}\n'
    validator.feed(b'{"text": 7}\n' + text * 9 + ROW + b"\n" + text)
    report = validator.finish()
    assert (report.format, report.examples) == (RowFormat.TEXT, 10)
    assert [(f.line, f.code) for f in report.findings] == [(1, "data_type"), (11, "mixed_formats")]
    assert report.findings[1].message == (
        "the row is a chat row (messages), line 2 is a text row (text); a file has one format"
    )
