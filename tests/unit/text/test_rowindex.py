"""The row index: where each row is, and which rows are equal."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import DataLoss
from lathe.text import rowindex
from lathe.text.rowindex import RowIndex, RowIndexWriter, example_digests, row_digest
from lathe.text.rows import parse_line


def chat(user="Hi", answer="Hello", **changes):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **changes}


def digest(row, **style):
    line = row if isinstance(row, bytes) else json.dumps(row, **style).encode()
    return row_digest(parse_line(line))


def index_of(content, path, chunk=7):
    with RowIndexWriter(path) as writer:
        for start in range(0, len(content), chunk):
            writer.feed(content[start : start + chunk])
        writer.finish()
    return RowIndex(path)


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (json.dumps(chat("é")).encode(), json.dumps(chat("é"), ensure_ascii=False, indent=None).encode()),
        (b'{"messages":[{"content":"Hi","role":"user"},{"role":"assistant","content":"Hello"}]}', chat()),
        (chat(tools=[{"type": "function", "function": WEATHER}]), chat(functions=[WEATHER])),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ),
        (chat(), {"instruction": "Hi", "input": "", "output": "Hello"}),
        (
            chat(),
            {"prompt": chat()["messages"][:1], "completion": chat()["messages"][1:]},
        ),
        (
            chat(),
            {"messages": [chat()["messages"][0], {**chat()["messages"][1], "weight": 1}]},
        ),
        (chat(), {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, chat()["messages"][1]]}),
    ],
)  # fmt: skip
def test_rows_that_say_the_same_are_equal(one, other):
    assert digest(one) == digest(other)


def test_rows_that_say_something_else_are_not():
    rows = [
        chat(),
        chat("hi"),
        chat("Hi "),
        chat(answer="Hello."),
        chat(tools=[{"type": "function", "function": WEATHER}]),
        {"messages": [{"role": "system", "content": "Be brief."}, *chat()["messages"]]},
        {**chat(), "label": True},
        {**chat(), "label": False},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "HiHello", "completion": "x"},
        {"text": "Hi"},
        {"text": "Hi", "label": "greeting"},
        {"text": "Hi", "label": "farewell"},
        {"anchor": "Hi", "positive": "Hello"},
    ]
    assert len({digest(row) for row in rows}) == len(rows)


QUESTION, ANSWER = chat()["messages"]
PAIR = {"input": {"messages": [QUESTION]}, "preferred_output": [ANSWER]}
WORSE = [{"role": "assistant", "content": "Go away."}]


def examples(row):
    return set(example_digests(parse_line(json.dumps(row).encode())))


@pytest.mark.parametrize(
    "row",
    [
        chat(),
        chat("Hi\n", " Hello "),
        {**chat(), "label": True},
        {**chat(), "label": False},
        {**PAIR, "non_preferred_output": WORSE},
        {"input": PAIR["input"], "preferred_output": WORSE, "non_preferred_output": [ANSWER]},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": WORSE},
        {"prompt": "Hi", "completion": " Hello"},
        {"prompt": "Hi", "completion": " Hello", "label": False},
        {"prompt": "Hi", "chosen": "Go away.", "rejected": "Hello"},
        {"question": "Hi", "answer": "Hello"},
    ],
)
def test_an_example_is_the_same_whatever_is_said_of_it(row):
    assert examples(chat()) & examples(row)


@pytest.mark.parametrize(
    "row",
    [
        chat("Ho"),
        chat(answer="Hello."),
        chat(tools=[{"type": "function", "function": WEATHER}]),
        {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER, {"role": "user", "content": "Bye"}, ANSWER]},
        {"input": PAIR["input"], "preferred_output": WORSE, "non_preferred_output": [QUESTION | {"role": "assistant"}]},
        {"text": "Hello"},
        {"prompt": "Hello", "completion": "Hi"},
    ],
)  # fmt: skip
def test_an_example_of_other_texts_is_another(row):
    assert not examples(chat()) & examples(row)


@given(
    texts=st.lists(st.sampled_from("abcdef"), max_size=12),
    others=st.lists(st.sampled_from("cdefgh"), max_size=12),
)
def test_the_rows_that_share_an_example_are_found(tmp_path_factory, texts, others):
    folder = tmp_path_factory.mktemp("index")
    few = [chat("Hi", text) for text in others]
    many = [
        {**PAIR, "preferred_output": WORSE, "non_preferred_output": [chat("", text)["messages"][1]]}
        for text in texts
    ]
    indexes = [
        index_of(b"".join(json.dumps(row).encode() + b"\n" for row in rows), folder / name, chunk=4096)
        for name, rows in (("few", few), ("many", many))
    ]
    found = list(indexes[1].positions_sharing(indexes[0]))
    assert found == [place for place, text in enumerate(texts) if text in others]


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]), min_size=8, max_size=8),
    bom=st.booleans(),
    last=st.booleans(),
    chunk=st.integers(1, 40),
    batch=st.integers(1, 4),
)
def test_every_row_is_where_its_entry_says(tmp_path_factory, *, texts, ends, bom, last, chunk, batch):
    rows = [json.dumps({"text": text}).encode() for text in texts]
    content = b"\xef\xbb\xbf" * bom + b"".join(row + end for row, end in zip(rows, ends, strict=False))
    content = content if last else content.rstrip(b"\r\n ")
    path = tmp_path_factory.mktemp("index") / "rows"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rowindex, "_BATCH_ROWS", batch)
        index = index_of(content, path, chunk)
    assert len(index) == len(rows)
    entries = [index.entry(position) for position in range(len(index))]
    assert [content[entry.offset : entry.offset + entry.length] for entry in entries] == rows
    lines = content.split(b"\n")
    for entry, row in zip(entries, rows, strict=True):
        assert row in lines[entry.line - 1]
        assert entry.digest == digest(row)
        assert index.at_line(entry.line) == entry
    assert list(index.lines()) == [entry.line for entry in entries]
    wanted = {entries[0].digest, entries[-1].digest}
    found = index.positions_of(pa.array(sorted(wanted), pa.binary(16)))
    assert list(found) == [n for n, entry in enumerate(entries) if entry.digest in wanted]


def test_a_line_without_a_row_has_no_entry(tmp_path):
    index = index_of(b'\n{"text": "a"}\n\n{"text": "b"}', tmp_path / "rows")
    assert [index.at_line(line) is not None for line in range(6)] == [False, False, True, False, True, False]


def test_a_row_that_is_refused_today_equals_the_same_line_only(tmp_path):
    index = index_of(b'{"text": 3}\n{"text":3}\n{"text": 3}\n', tmp_path / "rows")
    one, two, three = (index.entry(position).digest for position in range(3))
    assert one == three != two


def test_no_index_is_no_index(tmp_path):
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(DataLoss, match="no row index"):
        RowIndex(tmp_path / "other")
    with pytest.raises(DataLoss, match="no row index"):
        RowIndex(tmp_path / "missing")


def test_an_empty_file_has_an_empty_index(tmp_path):
    index = index_of(b"", tmp_path / "rows")
    assert len(index) == 0 and index.at_line(1) is None
    assert list(index.positions_of(pa.array([b"0" * 16], pa.binary(16)))) == []
