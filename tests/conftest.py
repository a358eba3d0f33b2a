"""Fixtures of every suite."""

import os

import pytest
from hypothesis import settings

# PostgreSQL is started under another user, for which Python has to fork; the handlers that gRPC has for that end one
# child in five with SIGSEGV while other threads are in calls. It reads this when it is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# How long an example takes is the machine's matter (a busy one, a first import); what it finds is the test's. CI tries
# the same examples each time, so that a change is judged by itself; each developer's run tries others.
settings.register_profile("lathe", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("lathe")

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.ray"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        default="embedded",
        help="what e2e runs against: embedded, processes, or host:port of a gateway (key in LATHE_API_KEY, "
        "HTTP address in LATHE_HTTP)",
    )
