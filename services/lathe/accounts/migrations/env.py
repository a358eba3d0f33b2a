"""Alembic's entry into the migrations of accounts."""

from lathe.common.db import run_migrations

run_migrations()
