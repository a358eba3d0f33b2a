"""Lineage as a client joins it: chains of models that go on from each other."""

from pathlib import Path

import pytest

from lathe.cli.lineage import line_of
from lathe.client.lineage import ancestry, descendants, trained_on, undocumented
from lathe.common.errors import InvalidArgument, NotFound
from lathe.v1 import models_pb2 as pb


def adapter(model: str, sha256: str, parent: str = "") -> pb.Adapter:
    return pb.Adapter(model_id=model, lineage=pb.Lineage(dataset_sha256=sha256, parent_model_id=parent))


ONE, TWO = adapter("ft:1", "a"), adapter("ft:2", "b", "ft:1")
THREE, OTHER = adapter("ft:3", "c", "ft:2"), adapter("ft:4", "b", "ft:gone")
ALL = [THREE, OTHER, ONE, TWO]


def test_the_ancestors_of_a_model_up_to_the_base_or_to_what_was_deleted() -> None:
    assert ancestry("ft:3", ALL) == ([THREE, TWO, ONE], "")
    assert ancestry("ft:4", ALL) == ([OTHER], "ft:gone")
    with pytest.raises(NotFound, match="ft:9"):
        ancestry("ft:9", ALL)
    loop = [adapter("ft:a", "x", "ft:b"), adapter("ft:b", "y", "ft:a")]
    assert ancestry("ft:a", loop) == (loop, "ft:a")


def test_who_was_trained_on_a_file_and_who_goes_on_from_them() -> None:
    assert trained_on({"b"}, ALL) == (OTHER, TWO)
    assert descendants((ONE,), ALL) == (TWO, THREE)
    assert descendants((ONE, TWO), ALL) == (THREE,)
    assert descendants((THREE,), ALL) == ()


def test_of_whom_it_cannot_be_said_what_they_were_trained_on() -> None:
    child = adapter("ft:5", "a", "ft:4")
    assert undocumented([*ALL, child], {"a", "b", "c"}) == (OTHER, child)
    assert undocumented(ALL, {"a", "b"}) == (THREE, OTHER)
    assert undocumented([ONE, TWO, THREE], {"b", "c"}) == (ONE, TWO, THREE)
    assert undocumented([ONE, TWO, THREE], {"a", "b", "c"}) == ()


def test_a_line_of_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "é"}\r\n\n{"text": "b"}'.encode())
    assert [line_of(path, line) for line in (1, 3)] == ['{"text": "é"}', '{"text": "b"}']
    for line in (2, 4):
        with pytest.raises(InvalidArgument, match=f"no row on line {line}"):
            line_of(path, line)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        line_of(path, 1)
