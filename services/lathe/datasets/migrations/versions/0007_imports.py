"""Datasets that the platform fetches by itself.

Revision ID: 0007
"""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("source", sa.String(4096), nullable=False, server_default=""))
    op.create_table(
        "imports",
        sa.Column("dataset_id", sa.String(64), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("source", sa.String(4096), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_time", UtcDateTime(), nullable=False, index=True),
    )


def downgrade() -> None:
    op.drop_table("imports")
    op.drop_column("datasets", "source")
