"""`lathe up` that cannot start says why in one clear sentence, and ends with an exit code that is not 0."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from tests.fixtures.platforms import environment
from tests.fixtures.servers import ended_with_us

START_S = 60


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def command(data: Path, **options: int) -> list[str]:
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, **options}
    flags = [part for name, port in ports.items() for part in (f"--{name.replace('_', '-')}", str(port))]
    return [sys.executable, "-m", "lathe.cli.main", "up", "--data", str(data), "--json", *flags]


def refusal(data: Path, settings: Mapping[str, str] | None = None, **options: int) -> str:
    """What it said when it refused. settings: LATHE_… variables."""
    ended = subprocess.run(
        command(data, **options),
        env=environment(settings or {}),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert ended.returncode not in (0, -6, -9, -11), ended
    assert ended.stdout == ""
    [sentence] = ended.stderr.strip().splitlines()
    return sentence


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port"])
def test_a_port_in_use(tmp_path: Path, taken: int, option: str) -> None:
    sentence = refusal(tmp_path, **{option: taken})
    assert f"Port {taken}" in sentence
    assert "in use" in sentence
    assert not (tmp_path / "endpoint.json").exists()


def test_a_folder_of_a_newer_version(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("99\n")
    sentence = refusal(tmp_path)
    assert "format 99" in sentence
    assert "newer version of Lathe" in sentence


def test_a_folder_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    assert "cannot be used" in refusal(tmp_path / "data")


def test_a_wrong_setting(tmp_path: Path) -> None:
    prices = {"LATHE_JOBS_PRICES__ENGINE_HOUR": '{"default": 1}'}
    assert refusal(tmp_path, prices) == "Wrong settings for the jobs service: prices: prices need a currency."


def test_a_second_one_on_the_same_folder_and_a_newer_database(tmp_path: Path) -> None:
    first = subprocess.Popen(command(tmp_path), env=environment({}), stdout=subprocess.PIPE)
    with ended_with_us(first.pid):
        assert first.stdout is not None
        with first.stdout:
            assert json.loads(first.stdout.readline())["api_key"]
        sentence = refusal(tmp_path)
        assert "running on" in sentence
        assert str(tmp_path) in sentence
        # The first one goes on, and where it answers is still written down.
        assert first.poll() is None
        assert (tmp_path / "endpoint.json").exists()
        first.terminate()
        assert first.wait(START_S) == 0

    with closing(sqlite3.connect(tmp_path / "db" / "jobs.sqlite")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'from-the-future'")
    sentence = refusal(tmp_path)
    assert "lathe.jobs" in sentence
    assert "newer version of Lathe" in sentence
