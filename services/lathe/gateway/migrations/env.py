"""Alembic's entry into the migrations of the gateway."""

from lathe.common.db import run_migrations

run_migrations()
