"""What the parts of the store share."""

from __future__ import annotations

import sqlalchemy as sa

from lathe.common.db import Database
from lathe.datasets.model import DatasetState
from lathe.datasets.tables import datasets

LIVE = datasets.c.state != DatasetState.DELETING.value
TRAINING_FILE = sa.and_(datasets.c.state == DatasetState.READY.value, datasets.c.purpose == "fine-tune")


class Base:
    """On a Database; each call is a transaction of its own."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def _change(self, statement: sa.Update | sa.Delete | sa.Insert) -> bool:
        """Whether it changed a row."""
        async with self._db.write() as connection:
            return (await connection.execute(statement)).rowcount > 0


def is_dataset(project: str, dataset_id: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return datasets.c.project == project, datasets.c.id == dataset_id
