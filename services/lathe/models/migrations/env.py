"""Alembic's entry into the migrations of models."""

from lathe.common.db import run_migrations

run_migrations()
