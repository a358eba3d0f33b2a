"""Datasets made from others, row indexes, frozen held-out sets.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("preparation", sa.JSON))
    op.add_column("datasets", sa.Column("index_version", sa.Integer, nullable=False, server_default="0"))
    op.add_column("datasets", sa.Column("frozen_as", sa.String(63)))
    op.create_index("datasets_by_frozen_name", "datasets", ["project", "frozen_as"], unique=True)
    op.create_table(
        "overlaps",
        sa.Column("frozen_sha256", sa.String(64), primary_key=True),
        sa.Column("dataset_sha256", sa.String(64), primary_key=True),
        sa.Column("count", sa.BigInteger),
        sa.Column("lines", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("overlaps")
    op.drop_index("datasets_by_frozen_name", "datasets")
    for column in ("frozen_as", "index_version", "preparation"):
        op.drop_column("datasets", column)
