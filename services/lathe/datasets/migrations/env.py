"""Alembic's entry into the migrations of datasets."""

from lathe.common.db import run_migrations

run_migrations()
