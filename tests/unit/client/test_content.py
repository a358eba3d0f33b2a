"""What is uploaded: hashed once, whole or piece by piece, and watched for changes."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.client import content as module
from lathe.client.content import Content, ContentDigest
from lathe.common.errors import InvalidArgument

DATA = bytes(range(200))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=8), st.booleans())
def test_however_often_the_sending_begins_anew_the_digest_is_the_files(
    tries: list[tuple[int, int]], beside: bool
) -> None:
    digest, sent = ContentDigest(Content.of(DATA)), 0
    if beside:
        with digest.made_beside() as whole:
            assert whole() == hashlib.sha256(DATA).hexdigest()
        sent = len(DATA)
    for wanted, size in tries:
        start = min(wanted, sent)
        digest.add(start, DATA[start : start + size])
        sent = max(sent, min(start + size, len(DATA)))
    assert digest.hexdigest() == digest.hexdigest() == hashlib.sha256(DATA).hexdigest()


def test_what_is_hashed_beside_stops_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    digest = ContentDigest(Content.of(DATA))
    with digest.made_beside():
        pass
    # Wherever it stopped, a stream goes on from there.
    digest.add(0, DATA[:150])
    assert digest.hexdigest() == hashlib.sha256(DATA).hexdigest()


def test_a_broken_streams_last_piece_may_come_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 50)
    digest, pieces = ContentDigest(Content.of(DATA)), Content.pieces

    def and_others_add_too(content: Content, offset: int) -> Iterator[bytes]:
        for piece in pieces(content, offset):
            digest.add(offset, DATA[offset : offset + 70])
            yield piece
            offset += len(piece)

    monkeypatch.setattr(Content, "pieces", and_others_add_too)
    assert digest.hexdigest() == hashlib.sha256(DATA).hexdigest()


def test_a_file_that_is_not_what_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(DATA)
    content = Content.of(file)
    assert (content.name, content.size) == ("a.jsonl", 200)
    content.check_unchanged()
    os.utime(file, ns=(5, 5))
    with pytest.raises(InvalidArgument, match="changed while it was uploaded"):
        content.check_unchanged()
    again = Content.of(file)
    file.unlink()
    with pytest.raises(InvalidArgument, match=r"a\.jsonl cannot be read"):
        again.check_unchanged()
    with (
        pytest.raises(InvalidArgument, match=r"a\.jsonl cannot be read"),
        ContentDigest(again).made_beside() as whole,
    ):
        whole()
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Content.of(file)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Content.of(tmp_path)
