"""Ports for servers of tests: nobody else gets one between its choice and the server that opens it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fixtures.servers import free_ports

# Prints those of the ports given that another process may claim.
CLAIM = "import sys; from tests.fixtures.servers import _claim; print([p for p in map(int, sys.argv[1:]) if _claim(p)])"


def test_no_port_is_given_twice() -> None:
    given = [port for _ in range(20) for port in free_ports(20)]
    assert len(set(given)) == 400


def test_another_run_of_tests_gets_none_of_them() -> None:
    ours = free_ports(3)
    done = subprocess.run(
        [sys.executable, "-c", CLAIM, *map(str, ours)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
