"""Fixtures of every suite."""

pytest_plugins = ["tests.fixtures.servers"]
