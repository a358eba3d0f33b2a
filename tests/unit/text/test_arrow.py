"""The token object: what goes in comes out, and the same rows are the same bytes."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import DataLoss
from lathe.text.arrow import (
    BATCH_ROWS,
    BATCH_TOKENS,
    TokenRow,
    TokenWriter,
    read_lines,
    read_tokens,
    write_tokens,
)
from lathe.text.formats import Role

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), max_size=8).map(
        lambda pairs: ([token for token, _ in pairs], bytes(mark for _, mark in pairs))
    ),
    max_size=20,
)


@given(rows=ROWS, repeat=st.sampled_from([1, BATCH_ROWS]))
def test_rows_come_back(tmp_path_factory, rows, repeat):
    path = tmp_path_factory.mktemp("arrow") / "tokens.arrow"
    made = [
        TokenRow(tokens, mask, line) for line, (tokens, mask) in enumerate(rows[:3] * repeat + rows, start=1)
    ]
    write_tokens(path, made, {"key": "k", "text": "1"})
    table = read_tokens(path)
    assert [row.tolist() for row in table.tokens] == [list(row.tokens) for row in made]
    assert [row.tolist() for row in table.mask] == [[bool(mark) for mark in row.mask] for row in made]
    assert table.lines == [row.line for row in made]
    assert table.roles == [Role.EXAMPLE] * len(made)
    assert table.metadata == {"format": "1", "key": "k", "text": "1"}
    assert all(row.dtype == np.int32 for row in table.tokens) and all(row.dtype == bool for row in table.mask)


def test_the_same_rows_are_the_same_bytes(tmp_path):
    digests = set()
    for name, metadata in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        write_tokens(tmp_path / name, [TokenRow([1, 2], b"\0\1", n) for n in range(1000)], metadata)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.arrow"
    path.write_bytes(b"no arrow at all")
    with pytest.raises(DataLoss, match=r"x\.arrow"):
        read_tokens(path)
    with pytest.raises(DataLoss):
        read_tokens(tmp_path / "missing.arrow")


def test_a_mask_is_as_long_as_its_tokens(tmp_path):
    with pytest.raises(ValueError, match="line 7"), TokenWriter(tmp_path / "x", {}) as writer:
        writer.write(TokenRow([1, 2], b"\1", 7))


def test_roles_come_back(tmp_path):
    roles = [Role.CHOSEN, Role.REJECTED, Role.CHOSEN, Role.REJECTED, Role.DESIRABLE, Role.UNDESIRABLE]
    write_tokens(tmp_path / "x", [TokenRow([1, 2], b"\0\1", 1, role) for role in roles], {})
    table = read_tokens(tmp_path / "x")
    assert (table.roles, table.metadata["format"]) == (roles, "2")


@pytest.mark.parametrize("rows", [0, 3])
def test_examples_alone_are_a_file_that_the_version_before_can_read(tmp_path, rows):
    write_tokens(tmp_path / "x", [TokenRow([1, 2], b"\0\1", n) for n in range(rows)], {})
    with pa.memory_map(str(tmp_path / "x")) as source:
        schema = pa.ipc.open_file(source).schema
    assert (schema.names, schema.metadata) == (["tokens", "mask", "line"], {b"format": b"1"})
    assert len(read_tokens(tmp_path / "x")) == rows


def test_a_role_among_examples_is_refused(tmp_path):
    rows = [TokenRow([1], b"\1", 1), TokenRow([1], b"\1", 2, Role.DESIRABLE)]
    with pytest.raises(ValueError, match="line 2"):
        write_tokens(tmp_path / "x", rows, {})


def test_long_rows_are_written_before_there_are_many(tmp_path):
    half = TokenRow([1] * (BATCH_TOKENS // 2), bytes(BATCH_TOKENS // 2), 1)
    write_tokens(tmp_path / "x", [half] * 5, {})
    with pa.memory_map(str(tmp_path / "x")) as source:
        file = pa.ipc.open_file(source)
        assert [file.get_batch(n).num_rows for n in range(file.num_record_batches)] == [2, 2, 1]


@pytest.mark.parametrize(
    "roles",
    [
        [Role.CHOSEN],
        [Role.REJECTED, Role.CHOSEN],
        [Role.CHOSEN, Role.EXAMPLE, Role.REJECTED],
        [Role.REJECTED],
    ],
)
def test_a_torn_pair_is_refused(tmp_path, roles):
    write_tokens(tmp_path / "x", [TokenRow([1], b"\1", 1, role) for role in roles], {})
    with pytest.raises(DataLoss, match="side by side"):
        read_tokens(tmp_path / "x")


def write_columns(path, **columns):
    """A file with other columns than this version writes, or other values."""
    types = {
        "tokens": pa.list_(pa.int32()),
        "mask": pa.list_(pa.uint8()),
        "line": pa.int64(),
        "role": pa.uint8(),
    }
    fields = [
        pa.field(name, pa.list_(pa.field("item", types[name].value_type, nullable=False)), nullable=False)
        if name in ("tokens", "mask")
        else pa.field(name, types[name], nullable=False)
        for name in columns
    ]
    table = pa.table(
        [pa.array(values, field.type) for values, field in zip(columns.values(), fields, strict=True)],
        schema=pa.schema(fields),
    )
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def test_a_file_of_format_1_is_read(tmp_path):
    write_columns(tmp_path / "old", tokens=[[1, 2], [3]], mask=[[0, 1], [1]], line=[1, 4])
    table = read_tokens(tmp_path / "old")
    assert [row.tolist() for row in table.tokens] == [[1, 2], [3]]
    assert (table.lines, table.roles) == ([1, 4], [Role.EXAMPLE] * 2)


def test_an_unknown_role_is_refused(tmp_path):
    write_columns(tmp_path / "new", tokens=[[1]], mask=[[1]], line=[1], role=[9])
    with pytest.raises(DataLoss, match="9"):
        read_tokens(tmp_path / "new")


def test_some_lines_are_read_alone(tmp_path):
    path = tmp_path / "x"
    rows = [TokenRow([line, 7], b"\0\1", line) for line in range(1, BATCH_ROWS + 9) if line != 5]
    write_tokens(path, rows, {})
    last = BATCH_ROWS + 8
    assert read_lines(path, [last, 3], 9) == [
        TokenRow([3, 7], b"\0\1", 3),
        TokenRow([last, 7], b"\0\1", last),
    ]
    assert read_lines(path, None, 9) == [TokenRow([1, 7], b"\0\1", 1)]
    assert read_lines(path, [1, 2, 3], 2) == [TokenRow([line, 7], b"\0\1", line) for line in (1, 2)]
    assert read_lines(path, [5], 9) == []
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataLoss):
        read_lines(path, [1], 9)
