"""The database of jobs."""

from lathe.jobs.store.sql import SqlJobStore

__all__ = ["SqlJobStore"]
