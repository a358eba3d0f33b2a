"""A service that cannot start names the thing and what to do in the last line that it logs: a pod shows that line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.platforms import environment
from tests.fixtures.servers import PostgresEndpoint

START_S = 60


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """What accounts needs; its database is missing."""
    (tmp_path / "token").write_text("secret")
    return {
        "LATHE_RPC__PORT": "0",
        "LATHE_RPC__HEALTH_PORT": "null",
        "LATHE_METRICS__PORT": "null",
        "LATHE_RPC__SERVICE_TOKEN_FILE": str(tmp_path / "token"),
    }


def last_line(*arguments: str, **variables: str) -> str:
    """The last line on stderr of a command that fails."""
    ended = subprocess.run(
        [sys.executable, "-m", "lathe.cli.main", *arguments],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert ended.returncode in (1, 4), ended
    return ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("127.0.0.1:1", "nothing listens on 127.0.0.1:1"),
        ("nowhere.invalid:5432", '"nowhere.invalid" is not known'),
    ],
)
def test_a_database_that_is_not_there(variables: dict[str, str], host: str, named: str) -> None:
    url = f"postgresql+psycopg://accounts:topsecret@{host}/accounts"
    for arguments in (("serve", "accounts"), ("migrate", "accounts", "--wait", "--timeout", "0")):
        line = last_line(*arguments, **variables, LATHE_ACCOUNTS_DB__URL=url)
        assert named in line
        assert "LATHE_ACCOUNTS_DB__URL" in line
        assert "topsecret" not in line


def test_a_user_and_a_database_that_the_server_does_not_know(
    variables: dict[str, str], postgres: PostgresEndpoint
) -> None:
    url = postgres.new_database("refusals")
    line = last_line(
        "serve", "accounts", **variables, LATHE_ACCOUNTS_DB__URL=url.replace("postgres@", "nobody@")
    )
    assert 'no user "nobody"' in line
    line = last_line(
        "serve", "accounts", **variables, LATHE_ACCOUNTS_DB__URL=url.replace("/refusals", "/missing")
    )
    assert '"missing"' in line
    line = last_line("serve", "accounts", **variables, LATHE_ACCOUNTS_DB__URL=url)
    assert "lathe migrate accounts" in line


def test_a_token_file_that_is_not_there(variables: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "lathe.cli.main", "migrate", "accounts"],
        env=environment({"LATHE_ACCOUNTS_DB__URL": f"sqlite+aiosqlite:///{tmp_path / 'db'}"}),
        check=True,
        capture_output=True,
        timeout=START_S,
    )
    variables |= {"LATHE_ACCOUNTS_DB__URL": f"sqlite+aiosqlite:///{tmp_path / 'db'}"}
    variables["LATHE_RPC__SERVICE_TOKEN_FILE"] = str(tmp_path / "no-token")
    assert "no-token" in last_line("serve", "accounts", **variables)
    variables["LATHE_LOG__FORMAT"] = "json"
    entry = json.loads(last_line("serve", "accounts", **variables))
    assert "no-token" in entry["message"]
    assert entry["level"] == "critical"
