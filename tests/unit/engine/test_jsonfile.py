"""A model's JSON files: whatever is wrong with one is said with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe.common.errors import InvalidArgument
from lathe.engine.jsonfile import read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "name": "é"}', encoding="utf-8")
    assert read_object(tmp_path / "config.json") == {"hidden_size": 64, "name": "é"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"config\.json cannot be read: No such file"),
        (b"{", r"config\.json is not JSON"),
        (b"\xff\xfe", r"config\.json is not JSON"),
        (b"[]", r"config\.json must hold a JSON object"),
        (b'{"a":' * 100_000, r"config\.json is nested too deeply"),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidArgument, match=said):
        read_object(tmp_path / "config.json")
