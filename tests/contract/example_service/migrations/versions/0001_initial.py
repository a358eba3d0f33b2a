"""Two tables."""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "parents",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("at", UtcDateTime, nullable=True),
        sa.Column("data", sa.JSON, nullable=True),
    )
    op.create_table(
        "children",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("parent", sa.String, sa.ForeignKey("parents.id"), nullable=False),
    )
