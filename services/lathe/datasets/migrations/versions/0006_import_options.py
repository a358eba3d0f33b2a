"""Datasets that are converted before they are stored.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("datasets", sa.Column("import_options", sa.JSON))
    op.add_column("datasets", sa.Column("source_sha256", sa.String(64), nullable=False, server_default=""))
    op.add_column(
        "datasets", sa.Column("source_size_bytes", sa.BigInteger, nullable=False, server_default="0")
    )


def downgrade() -> None:
    for column in ("source_size_bytes", "source_sha256", "import_options"):
        op.drop_column("datasets", column)
