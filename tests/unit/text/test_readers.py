"""CSV, Parquet and JSON arrays as training rows, and what is said of those that are none."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lathe.text import csv_reader, json_reader
from lathe.text.columns import Columns, resolve_columns
from lathe.text.errors import RowError
from lathe.text.filekinds import FileType, file_type_of
from lathe.text.readers import read_records

Read = Callable[..., list[Any]]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """The rows of a content; an error in the place of a bad one."""
    path = tmp_path / "file"

    def records(content: bytes, file_type: str, **columns: str) -> list[Any]:
        path.write_bytes(content)
        return [
            record.row if record.error is None else (record.place, record.error.code, record.error.field)
            for record in read_records(path, FileType(file_type), columns)
        ]

    return records


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"prompt,completion\na,b\n", [{"prompt": "a", "completion": "b"}]),
        (
            b"\xef\xbb\xbfprompt;completion\r\na;b\r\n\r\nc;d",
            [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}],
        ),
        (b'Prompt\tCompletion\tid\na\t"b\n""c"""\t7\n', [{"prompt": "a", "completion": 'b\n"c"', "id": "7"}]),
        (b',text\n0,"a, b"\n', [{"text": "a, b"}]),
        (b"\xef\xbb\xbfsep=;\r\ntext;id\r\na,b,c;0\r\n", [{"text": "a,b,c", "id": "0"}]),
        (
            b"text,label\na,3\nb,x\nc,true\n",
            [{"text": "a", "label": 3}, {"text": "b", "label": "x"}, {"text": "c", "label": True}],
        ),
        (
            b"prompt,completion,label\na,b,1\nc,d,False\n",
            [
                {"prompt": "a", "completion": "b", "label": True},
                {"prompt": "c", "completion": "d", "label": False},
            ],
        ),
        (
            b"text,label\na,1.5\na,-.5\na,1e3\na,007\na,1_0\na,12345678901234567890\n",
            [
                *({"text": "a", "label": number} for number in (1.5, -0.5, 1000.0)),
                *({"text": "a", "label": text} for text in ("007", "1_0", "12345678901234567890")),
            ],
        ),
        (b"sentence1,sentence2,score\na,b,0.5\n", [{"sentence1": "a", "sentence2": "b", "score": 0.5}]),
        (
            b'prompt,chosen,rejected\n[a],b,"[{""x"": 1}]"\n',
            [{"prompt": "[a]", "chosen": "b", "rejected": '[{"x": 1}]'}],
        ),
        (
            b"messages,tools\n" + b'"' + json.dumps(TURNS).replace('"', '""').encode() + b'",\n',
            [{"messages": TURNS}],
        ),
        (b"prompt,completion\n", []),
        (b"", []),
    ],
)
def test_csv(read: Read, content: bytes, rows: list[Any]) -> None:
    assert read(content, "csv") == rows


def test_csv_that_is_wrong_names_the_line_and_goes_on(read: Read) -> None:
    content = b'prompt,completion\na,b\nc\nd,"e"x\n"f\ng",h\nmessy,i,j\nk,l\n'
    assert read(content, "csv") == [
        {"prompt": "a", "completion": "b"},
        ("line 3", "invalid_csv", ""),
        ("line 4", "invalid_csv", ""),
        {"prompt": "f\ng", "completion": "h"},
        ("line 7", "invalid_csv", ""),
        {"prompt": "k", "completion": "l"},
    ]
    assert read(b"sep=;\ntext;id\na\n", "csv") == [("line 3", "invalid_csv", "")]
    python = b"messages\n\"[{'role': 'user'}]\"\n"
    assert read(python, "csv") == [("line 2", "invalid_json", "messages")]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"text,text\na,b\n", "invalid_csv", "more than one column 'text'"),
        (b"t\xff\na\n", "invalid_utf8", "header cannot be read: byte 2 of line 1"),
        (b'"text\na\n', "invalid_csv", "header cannot be read: .* a quote is not closed"),
        (b"text\ra\rb\r", "invalid_csv", "a CR stands alone; end lines with LF"),
        (b"t\x00e\x00\n\x00a\x00", "invalid_csv", "header cannot be read: a NUL byte .* UTF-16"),
        (b"text" + b"a" * 2000 + b"\n", "line_too_long", "header cannot be read: the row is longer"),
        (b"\x1f\x8b\x08\x00", "compressed_file", "gzip"),
        (b"PK\x03\x04", "compressed_file", "zip"),
        (b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "wrong_file_type", "Excel workbook .* CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "wrong_file_type", "Excel workbook"),
        (b"\xff\xfet\x00", "wrong_file_type", "UTF-16"),
        (b"PAR1", "wrong_file_type", "Parquet"),
    ],
)
def test_csv_of_which_nothing_can_be_read(
    read: Read, monkeypatch: pytest.MonkeyPatch, content: bytes, code: str, words: str
) -> None:
    monkeypatch.setattr(csv_reader, "MAX_LINE_BYTES", 1000)
    with pytest.raises(RowError, match=words) as caught:
        read(content, "csv")
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"a\xff\nb\n", ("line 4", "invalid_utf8", "byte 2 of line 4")),
        (b'"a\nb\xff"\n', ("line 4", "invalid_utf8", "byte 2 of line 5")),
        (b'"a\n' + b"b\n" * 600, ("line 4", "line_too_long", "is a quote not closed")),
        (b"a" * 2000 + b"\n", ("line 4", "line_too_long", "longer than 1000 bytes")),
        (b'"a\nb\n', ("line 4", "invalid_csv", "a quote is not closed")),
    ],
)
def test_csv_that_cannot_be_read_further_says_from_where_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, wrong: tuple[str, str, str]
) -> None:
    monkeypatch.setattr(csv_reader, "MAX_LINE_BYTES", 1000)
    (tmp_path / "file").write_bytes(b'text\n"x\ny"\n' + content)
    *good, last = read_records(tmp_path / "file", FileType.CSV, {})
    assert [record.row for record in good] == [{"text": "x\ny"}]
    assert last.error is not None
    assert (last.place, last.error.code, last.last) == (*wrong[:2], True)
    assert wrong[2] in last.error.detail


def test_a_csv_row_with_a_nul_byte_is_none(read: Read) -> None:
    assert read(b'text\na\nb\x00\n"c\n\x00"\nd\n', "csv") == [
        {"text": "a"},
        ("line 3", "invalid_csv", ""),
        ("line 4", "invalid_csv", ""),
        {"text": "d"},
    ]


@pytest.mark.parametrize("cell", ["nan", "NaN", "-inf", "Infinity", "1e999"])
def test_a_cell_that_is_no_finite_number_is_refused(read: Read, cell: str) -> None:
    content = f"sentence1,sentence2,score\na,b,.5\na,b,{cell}\n".encode()
    assert read(content, "csv") == [
        {"sentence1": "a", "sentence2": "b", "score": 0.5},
        ("line 3", "data_type", "score"),
    ]


@pytest.mark.parametrize("cell", ["1_0", "12345678901234567890", "١٢", "1,5", "nano"])
def test_a_label_that_only_python_takes_for_a_number_is_a_text(read: Read, cell: str) -> None:
    assert read(f"text;label\na;{cell}\n".encode(), "csv") == [{"text": "a", "label": cell}]


def test_parquet(read: Read) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": TURNS, "source": "x", "tools": None},
        {"messages": [*TURNS, {"role": "user", "content": None, "name": "z"}], "source": None, "tools": "[]"},
    ]
    assert read(parquet(rows), "parquet") == [
        {"messages": TURNS},
        {"messages": [*TURNS, {"role": "user", "name": "z"}], "tools": []},
    ]
    answered = [{"messages": TURNS, "id": 1, "tools": "[]"}, {"messages": TURNS[:1], "id": 2, "tools": None}]
    assert read(parquet(answered), "parquet") == [
        {"messages": TURNS, "tools": []},
        {"messages": TURNS[:1], "id": 2},
    ]
    many = [{"text": f"{n}"} for n in range(1000)]
    assert read(parquet(many, row_group_size=100), "parquet") == many
    pictures = [{"text": "a", "image": {"bytes": b"\x00"}}, {"text": "b", "thumbnail": b"\x00"}]
    assert read(parquet(pictures[1:]), "parquet") == [{"text": "b"}]
    assert read(parquet(pictures[:1]), "parquet") == [("row 1", "data_type", "image")]


@pytest.mark.parametrize(
    "answer", ["[]", '[{"role": "CEO", "name": "Bo"}]', '{"messages": []}', json.dumps(TURNS)]
)
def test_an_answer_that_is_json_is_a_text(read: Read, answer: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "completion": answer},
        {"prompt": "q", "chosen": answer, "rejected": "b"},
        {"instruction": "q", "input": answer, "output": answer},
    ]
    for row in rows:
        table = io.StringIO(newline="")
        csv.writer(table).writerows([row.keys(), row.values()])
        assert read(table.getvalue().encode(), "csv") == [row]
        assert read(parquet([row]), "parquet") == [row]
    turns = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert read(parquet([{key: json.dumps(value) for key, value in turns.items()}]), "parquet") == [turns]


def test_null_in_json_is_kept_where_it_says_something(read: Read) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    row = {"messages": TURNS, "tools": [tool], "source": None}
    assert read(json.dumps([row]).encode(), "json") == [{"messages": TURNS, "tools": [tool]}]
    assert read(json.dumps(row).encode(), "jsonl", messages="messages", tools="tools") == [
        {"messages": TURNS, "tools": [tool]}
    ]


def test_a_prompt_that_only_repeats_what_is_asked_is_left_out(read: Read) -> None:
    """As in UltraChat 200k and No Robots."""
    asked = [{"role": "system", "content": "s"}, *TURNS]
    row = {"prompt": "q", "prompt_id": "7", "messages": asked, "category": "Chat"}
    assert read(parquet([row]), "parquet") == [{"messages": asked}]
    other = {**row, "prompt": "Be a pirate."}
    assert read(parquet([other]), "parquet") == [{"prompt": "Be a pirate.", "messages": asked}]


def test_parquet_that_is_damaged(read: Read) -> None:
    whole = parquet([{"text": "a" * 100} for _ in range(100)], compression="zstd")
    middle = len(whole) // 3
    for content in (
        b"",
        b"PAR1",
        whole[:-10],
        b"text\na\n",
        whole[:20] + b"\xff" * middle + whole[20 + middle :],
    ):
        with pytest.raises(RowError) as caught:
            read(content, "parquet")
        assert caught.value.code == "invalid_parquet"
    with pytest.raises(RowError, match="gzip"):
        read(b"\x1f\x8b\x08", "parquet")


def test_parquet_that_is_damaged_behind_good_rows(tmp_path: Path) -> None:
    rows = [{"text": f"{number:04d}" * 50} for number in range(400)]
    whole = bytearray(parquet(rows, row_group_size=100, compression="none", use_dictionary=False))
    begin = whole.index(rows[250]["text"].encode()) - 4
    whole[begin : begin + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "file").write_bytes(whole)
    *good, last = read_records(tmp_path / "file", FileType.PARQUET, {})
    assert [record.row for record in good] == rows[: len(good)]
    assert 0 < len(good) <= 250
    assert last.error is not None
    assert (last.place, last.error.code, last.last) == (f"row {len(good) + 1}", "invalid_parquet", True)


def test_parquet_with_a_text_that_is_not_utf8_names_the_row(read: Read) -> None:
    texts = pa.array([b"a", b"\xff", b"b"], pa.binary())
    prompts = pa.StringArray.from_buffers(3, *texts.buffers()[1:])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": prompts, "completion": ["x", "y", "z"]}), buffer)
    assert read(buffer.getvalue(), "parquet") == [
        {"prompt": "a", "completion": "x"},
        ("row 2", "invalid_utf8", "prompt"),
        {"prompt": "b", "completion": "z"},
    ]


def test_parquet_with_numbers_that_json_does_not_have(read: Read) -> None:
    rows = [{"text": "a", "label": number, "loss": number} for number in (0.5, math.nan, -math.inf)]
    assert read(parquet(rows), "parquet") == [
        {"text": "a", "label": 0.5, "loss": 0.5},
        ("row 2", "data_type", "label"),
        ("row 3", "data_type", "label"),
    ]
    assert read(parquet(rows[1:]), "parquet", text="text") == [{"text": "a"}, {"text": "a"}]


@pytest.mark.parametrize("zone", ["UTC", "+02:00", "Europe/Berlin"])
def test_a_time_of_a_zone_is_read_without_knowing_zones(read: Read, zone: str) -> None:
    """Images have no database of them, and Arrow refuses to write such a time then."""
    times = pa.array([10**15], pa.timestamp("us", zone))
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"text": ["a"], "at": times, "all": pa.array([[10**15]], pa.large_list(times.type))}), buffer
    )
    (row,) = read(buffer.getvalue(), "parquet")
    assert row == {"text": "a", "at": (at := "2001-09-09 01:46:40.000000"), "all": [at]}


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("ns", "Europe/Berlin"), pa.date32(), pa.time64("ns"),
        pa.duration("ns"), pa.list_(pa.timestamp("ns")), pa.struct([("at", pa.timestamp("us", "UTC"))]),
    ],
)  # fmt: skip
def test_a_column_of_times_keeps_nobody_from_training(read: Read, kind: pa.DataType) -> None:
    """Whether or not there are Python values for all of them."""
    width = pa.int32() if kind == pa.date32() else pa.int64()
    leaf = (
        kind.value_type
        if pa.types.is_list(kind)
        else kind.field(0).type
        if pa.types.is_struct(kind)
        else kind
    )
    times = pa.array([1, (1 << 30) + 1], width).cast(leaf)
    if pa.types.is_list(kind):
        times = pa.ListArray.from_arrays([0, 1, 2], times)
    elif pa.types.is_struct(kind):
        times = pa.StructArray.from_arrays([times], ["at"])
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"], "made": times}), buffer)
    found = read(buffer.getvalue(), "parquet")
    assert [row["text"] for row in found] == ["a", "b"]
    json.dumps(found)


def test_parquet_with_columns_that_cannot_be_told_apart(read: Read) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    buffer = io.BytesIO()
    pq.write_table(twice, buffer)
    with pytest.raises(RowError, match="more than one column 'text'") as caught:
        read(buffer.getvalue(), "parquet")
    assert caught.value.code == "invalid_parquet"


def test_json_arrays(read: Read) -> None:
    rows = [{"text": "é" * n} for n in range(50)]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "\ufeff \n" + json.dumps(rows),
    ):
        assert read(text.encode(), "json") == rows
    assert read(b"[]", "json") == []
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    assert read(lines, "json") == rows


@pytest.mark.parametrize(
    ("content", "good", "wrong"),
    [
        (b"[", 0, ("line 1", "invalid_json", "Expecting value")),
        (b'[{"a": 1}', 1, ("line 1", "invalid_json", "a comma or the end")),
        (b'[{"a": 1},\n{"a": 1}\n\n', 2, ("line 4", "invalid_json", "a comma or the end")),
        (b'[{"a": 1},\n]', 1, ("line 2", "invalid_json", "Expecting value")),
        (b'[{"a": 1} {}]', 1, ("line 1", "invalid_json", "a comma or the end")),
        (b'[{"a": 1}] x', 1, ("line 1", "invalid_json", "behind the list")),
        (b'[\n{"a": 1},\n{"a": "x', 1, ("line 3", "invalid_json", "Unterminated string starting")),
        (b'[{"a": 1},\n{"a":\n1e999}]', 1, ("line 2", "invalid_json", "too large")),
        (b'[{"a": NaN}]', 0, ("line 1", "invalid_json", "NaN")),
        (b'[{"a": "\x00"}]', 0, ("line 1", "invalid_json", "Invalid control character")),
        (b'[{"a": ' + b"9" * 900 + b"0" * 4000 + b"}]", 0, ("line 1", "invalid_json", "too many digits")),
        (b"\n[" * 10_000, 0, ("line 3", "invalid_json", "nested too deeply")),
        (b'[{"a": 1},\n{"a":\n"\xff"}]', 1, ("line 3", "invalid_utf8", "not UTF-8")),
        (b'[{"a": 1},\n{"a": ' + b'"' + b"x" * 9000, 1, ("line 2", "line_too_long", "an element is longer")),
    ],
)
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_json_that_cannot_be_read_further_says_from_where_on(
    tmp_path: Path, content: bytes, good: int, wrong: tuple[str, str, str], chunk: int
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "MAX_LINE_BYTES", 8000)
        patch.setattr(json_reader, "CHUNK_BYTES", chunk)
        *before, last = read_records(tmp_path / "file", FileType.JSON, {})
    assert [record.row for record in before] == [{"a": 1}] * good
    assert last.error is not None
    assert (last.place, last.error.code, last.last) == (*wrong[:2], True)
    assert wrong[2] in last.error.detail
    assert " at" not in last.error.detail[-3:]


def test_elements_that_are_no_rows_are_named_and_the_others_are_rows(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "CHUNK_BYTES", 16)
    content = b'[{"a": 1}, {"a": "\\ud800"}, ' + b"9" * 300 + b', [1], true, "", {"a": 2}]'
    assert read(content, "json") == [
        {"a": 1},
        ("element 2", "invalid_utf8", "a"),
        ("element 3", "data_type", ""),
        ("element 4", "data_type", ""),
        ("element 5", "data_type", ""),
        ("element 6", "data_type", ""),
        {"a": 2},
    ]


@pytest.mark.parametrize("depth", [300, 600, 900])
def test_a_row_that_nests_deeply_is_a_row_or_is_named(read: Read, depth: int) -> None:
    row = b'{"text": "a", "extra": ' + b"[" * depth + b"]" * depth + b"}"
    for found in (read(b"[" + row + b"]", "json"), read(row, "jsonl", text="text", prompt="extra")):
        assert len(found) == 1
        assert isinstance(found[0], dict) or found[0][1] == "invalid_json"


ROW = st.dictionaries(
    st.text(max_size=3),
    st.text(max_size=6)
    | st.integers()
    | st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    max_size=3,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(ROW, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
def test_a_json_array_does_not_depend_on_how_it_is_read(
    read: Read, rows: list[Any], chunk: int, indent: int | None, ascii: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "CHUNK_BYTES", chunk)
        content = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode()
        found = read(content, "json")
    assert found == rows


CELL = st.text(alphabet='ab,"\n\r é;', max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(CELL, CELL), max_size=5))
def test_what_a_csv_library_writes_is_read_back(read: Read, rows: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("one", "two"), *rows])
    assert read(text.getvalue().encode(), "csv") == [{"one": one, "two": two} for one, two in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(content=st.binary(max_size=200), file_type=st.sampled_from(FileType))
def test_any_bytes_give_rows_or_a_reason(read: Read, content: bytes, file_type: FileType) -> None:
    if file_type is FileType.PARQUET:
        content = b"PAR1" + content + len(content).to_bytes(4, "little") + b"PAR1"
    try:
        read(content, file_type)
    except RowError as error:
        assert error.code and error.detail


def test_a_mapping_renames_and_leaves_out(read: Read) -> None:
    content = b"id,Frage,Antwort\n1,q,a\n"
    assert read(content, "csv", prompt="Frage", completion="Antwort") == [{"prompt": "q", "completion": "a"}]
    line = b'{"id": 1, "Frage": "q", "Antwort": "a"}\n{"Frage": "r"}\n'
    assert read(line, "jsonl", prompt="Frage", completion="Antwort") == [
        {"prompt": "q", "completion": "a"},
        {"prompt": "r"},
    ]
    rows = parquet([{"x": "q", "y": "a", "z": 1}])
    assert read(rows, "parquet", question="x", answer="y") == [{"question": "q", "answer": "a"}]
    with pytest.raises(RowError, match="no column 'Text'; its columns are 'id', 'Frage', 'Antwort'"):
        read(content, "csv", text="Text")


def test_a_line_that_is_no_row_is_named(read: Read) -> None:
    assert read(b'{"a": "x"}\n[1]\n{\n', "jsonl", text="a") == [
        {"text": "x"},
        ("line 2", "data_type", ""),
        ("line 3", "invalid_json", ""),
    ]


def test_autotrains_names() -> None:
    assert resolve_columns({"text_column": "t"}) == {"text": "t"}
    assert resolve_columns({"prompt_text_column": "p", "text_column": "t", "rejected_text_column": "r"}) == {
        "prompt": "p",
        "chosen": "t",
        "rejected": "r",
    }
    # As its own configurations have it for sets of conversations.
    assert resolve_columns({"text_column": "messages"}) == {"messages": "messages"}
    assert resolve_columns({"text_column": "Conversations"}) == {"conversations": "Conversations"}


@pytest.mark.parametrize(
    "columns", [{"promt": "p"}, {"prompt": ""}, {"prompt": "a", "prompt_text_column": "b"}]
)
def test_a_mapping_that_cannot_be(columns: dict[str, str]) -> None:
    with pytest.raises(RowError) as caught:
        Columns(columns)
    assert caught.value.code == "unknown_column"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.CSV", "csv"),
        ("a.tsv", "csv"),
        ("b.json", "json"),
        ("c.parquet", "parquet"),
        ("d.jsonl", "jsonl"),
        ("e", "jsonl"),
    ],
)
def test_a_name_says_the_type(name: str, found: str) -> None:
    assert file_type_of(name) == found
