"""Alembic's entry into the migrations of jobs."""

from lathe.common.db import run_migrations

run_migrations()
