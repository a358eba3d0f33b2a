#!/usr/bin/env python3
"""PostgreSQL with a database for each of Lathe's services, for trying out and for tests.

Environment: POSTGRES_PASSWORD (the superuser's, `postgres`) and POSTGRES_PASSWORD_<SERVICE> for accounts, datasets,
models, jobs and gateway. Data: /var/lib/lathe/postgres, or POSTGRES_DATA. Port: 5432, or POSTGRES_PORT.
Databases, roles and passwords are brought to what the environment says at each start, before the port opens.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tryout_common import Server, lack_of_room, refuse, setting, volume

SERVICES = ("accounts", "datasets", "models", "jobs", "gateway")
# Roles are created like this whatever the clients do: libpq and psycopg speak it too.
_HBA = "local all all scram-sha-256\nhost all all all scram-sha-256\n"
_PROBLEM = re.compile(r"^.*(?:ERROR|FATAL|PANIC): +(.*)$", re.MULTILINE)


def main() -> None:
    """Prepare the data folder and serve it until SIGTERM."""
    superuser = setting("POSTGRES_PASSWORD", "the superuser's password")
    passwords = {
        name: setting(f"POSTGRES_PASSWORD_{name.upper()}", f"the {name} service's password")
        for name in SERVICES
    }
    root = volume(Path(os.environ.get("POSTGRES_DATA", "/var/lib/lathe/postgres")))
    data = root / "pgdata"
    if not (data / "PG_VERSION").exists():
        _create(root, data)
    (data / "pg_hba.conf").write_text(_HBA)
    found = set(re.findall(r'datname = "(\w+)"', _single_user(data, ["SELECT datname FROM pg_database"])))
    _single_user(data, roles(superuser, passwords))
    _single_user(data, databases(found))
    port = os.environ.get("POSTGRES_PORT", "5432")
    command = ["postgres", "-D", str(data), "-p", port, "-k", "/tmp", "-c", "listen_addresses=*"]
    command += ["-c", "max_connections=200", "-c", "log_min_messages=warning"]
    # SIGTERM waits until the last client has gone; SIGINT ends their sessions and stops in order.
    Server(command, root, stop=signal.SIGINT).wait("PostgreSQL", root)


def roles(superuser: str, passwords: Mapping[str, str]) -> list[str]:
    """The statements that make each role, and give all of them the passwords of today."""
    statements = [f"ALTER ROLE postgres PASSWORD {_literal(superuser)}"]
    for name, password in passwords.items():
        missing = f"NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{name}')"
        statements.append(f"DO $$ BEGIN IF {missing} THEN CREATE ROLE {name} LOGIN; END IF; END $$")
        statements.append(f"ALTER ROLE {name} PASSWORD {_literal(password)}")
    return statements


def databases(found: set[str]) -> list[str]:
    """The statements that make each database that is not among those found, and close each to others' roles."""
    statements = [f"CREATE DATABASE {name} OWNER {name}" for name in SERVICES if name not in found]
    return statements + [f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC" for name in SERVICES]


def _literal(text: str) -> str:
    quoted = text.replace("'", "''")
    return f"'{quoted}'"


def _create(root: Path, data: Path) -> None:
    """A new data folder under another name first, so that one half made is never taken for whole."""
    for left in root.glob("new-*"):
        shutil.rmtree(left)
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=root))
    command = ["initdb", "-D", str(fresh), "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8"]
    command += ["--auth=scram-sha-256", "--pwfile=/dev/stdin", "--no-instructions"]
    # A passing password: the real one is set with the others', at each start.
    done = subprocess.run(
        command,
        input=os.urandom(16).hex(),
        text=True,
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode != 0:
        refuse(
            lack_of_room(root)
            or f"PostgreSQL could not make its data folder in {root}: {done.stdout.strip()}"
        )
    fresh.rename(data)


def _single_user(data: Path, statements: Sequence[str]) -> str:
    """Run statements without a server; ends the program with PostgreSQL's own sentence if one fails.

    In single-user mode a statement ends with the line, and a failed one shows in the log alone.
    """
    done = subprocess.run(
        ["postgres", "--single", "-D", str(data), "postgres"],
        input="\n".join(statements) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    problem = _PROBLEM.search(done.stderr)
    if done.returncode != 0 or problem:
        said = problem.group(1) if problem else done.stderr.strip() or f"status {done.returncode}"
        refuse(lack_of_room(data) or f"PostgreSQL could not prepare {data}: {said}")
    return done.stdout


if __name__ == "__main__":
    main()
