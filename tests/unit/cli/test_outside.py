"""What the user gave wrongly is named, before anything is called."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from lathe.cli.connection import Target
from lathe.cli.examination import _certificate
from lathe.cli.outside import fetch_info, split_address
from lathe.common.errors import InvalidArgument


@pytest.fixture(params=["missing", "no certificate"])
def ca_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    if request.param != "missing":
        path.write_text("nothing of the kind")
    return path


def test_a_wrong_ca_file_is_not_blamed_on_the_platform(ca_file: Path) -> None:
    found = _certificate(Target("127.0.0.1:1", "", "", True, ca_file), datetime.now(UTC))
    assert not found.ok and str(ca_file) in found.message and "--ca-file" in found.advice
    with pytest.raises(InvalidArgument, match=r"ca\.pem"):
        fetch_info("https://127.0.0.1:1", ca_file, 1)


@pytest.mark.parametrize("address", ["a..b:1", f"{'a' * 64}.example:1", "", "a/b:1", "k@host:1", "host:port"])
def test_what_cannot_be_an_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="no address"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("lathe.example.com:7460") == ("lathe.example.com", 7460)
    assert split_address("lathe.example.com.") == ("lathe.example.com.", None)
    assert split_address("[::1]:7460") == ("[::1]", 7460)
    assert split_address("bücher.example:1") == ("bücher.example", 1)
    assert split_address("my_host") == ("my_host", None)
