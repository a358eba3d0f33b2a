"""Fixtures of every suite."""

import pytest
from hypothesis import settings

# How long an example takes is the machine's matter (a busy one, a first import); what it finds is the test's.
settings.register_profile("lathe", deadline=None)
settings.load_profile("lathe")

pytest_plugins = ["tests.fixtures.servers", "tests.fixtures.ray"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--target",
        default="embedded",
        help="what e2e runs against: embedded, processes, or host:port of a gateway (key in LATHE_API_KEY, "
        "HTTP address in LATHE_HTTP)",
    )
