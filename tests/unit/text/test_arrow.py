"""The token object: what goes in comes out, and the same rows are the same bytes."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import DataLoss
from lathe.text.arrow import BATCH_ROWS, TokenRow, TokenWriter, read_tokens, write_tokens

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
