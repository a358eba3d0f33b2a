"""The try-out's entry scripts: what they ask of PostgreSQL and SeaweedFS, what they say when something is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[3] / "docker" / "tryout"
PASSWORDS = {"accounts": "a", "datasets": "b", "models": "c", "jobs": "d", "gateway": "e"}


@pytest.fixture
def tryout(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("tryout_common", monkeypatch)


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("tryout_postgres", monkeypatch)


@pytest.fixture
def seaweedfs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return _module("tryout_seaweedfs", monkeypatch)


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(name)


def test_every_service_gets_a_database_of_its_own(postgres: ModuleType) -> None:
    made = [one for one in postgres.databases(set()) if one.startswith("CREATE")]
    assert made == [f"CREATE DATABASE {name} OWNER {name}" for name in PASSWORDS]


def test_a_database_that_is_there_is_kept(postgres: ModuleType) -> None:
    found = set(PASSWORDS) - {"jobs"}
    assert [one for one in postgres.databases(found) if one.startswith("CREATE")] == [
        "CREATE DATABASE jobs OWNER jobs"
    ]


def test_passwords_are_set_at_each_start_and_quoted(postgres: ModuleType) -> None:
    statements = postgres.roles("it's", PASSWORDS)
    assert statements[0] == "ALTER ROLE postgres PASSWORD 'it''s'"
    assert "ALTER ROLE gateway PASSWORD 'e'" in statements


def test_only_s3_listens_beyond_the_machine(seaweedfs: ModuleType) -> None:
    command = seaweedfs.command(Path("/data"), "8333")
    assert "-ip.bind=127.0.0.1" in command
    assert [word for word in command if "0.0.0.0" in word] == ["-s3.ip.bind=0.0.0.0"]


def test_a_missing_setting_is_named(
    tryout: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("S3_BUCKET", raising=False)
    with pytest.raises(SystemExit) as ended:
        tryout.setting("S3_BUCKET", "the bucket's name")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "S3_BUCKET is not set: give the bucket's name in the environment.\n"


def test_a_line_break_in_a_password_is_refused(
    tryout: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "one\ntwo")
    with pytest.raises(SystemExit):
        tryout.setting("POSTGRES_PASSWORD", "the superuser's password")
    said = capsys.readouterr().err
    assert "POSTGRES_PASSWORD has a line break" in said
    assert "one" not in said.replace("without one", "")


def test_a_full_volume_is_named(
    tryout: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tryout, "ROOM_BYTES", 2**62)
    with pytest.raises(SystemExit):
        tryout.volume(tmp_path / "data")
    assert f"The volume at {tmp_path / 'data'} is full" in capsys.readouterr().err


def test_a_volume_with_room_is_taken_and_left_clean(tryout: ModuleType, tmp_path: Path) -> None:
    tryout_folder = tryout.volume(tmp_path / "data")
    assert list(tryout_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["Lathe", "a", "with_underscore"])
def test_a_name_that_no_bucket_may_have_is_refused(
    seaweedfs: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in {"S3_ACCESS_KEY": "a", "S3_SECRET_KEY": "s", "S3_BUCKET": name}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("sys.argv", ["tryout-seaweedfs"])
    with pytest.raises(SystemExit):
        seaweedfs.main()
    assert repr(name) in capsys.readouterr().err
