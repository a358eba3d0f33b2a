"""Methods beside supervised, training options, receipts and reruns; figures of a step; parts of an event.

Revision ID: 0003

The version before this one goes on working on these tables: every new column may be empty, and it leaves what it does
not know as it is.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("extra", sa.JSON(), nullable=True))
    op.add_column("attempts", sa.Column("receipt", sa.JSON(), nullable=True))
    op.add_column("metrics", sa.Column("figures", sa.JSON(), nullable=True))
    op.add_column("events", sa.Column("kind", sa.String(length=32), nullable=False, server_default=""))
    op.add_column("events", sa.Column("data", sa.JSON(), nullable=True))


def downgrade() -> None:
    for table, column in (
        ("events", "data"),
        ("events", "kind"),
        ("metrics", "figures"),
        ("attempts", "receipt"),
        ("jobs", "extra"),
    ):
        op.drop_column(table, column)
