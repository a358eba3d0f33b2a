"""The format of a job, so that a replica leaves alone what it cannot read.

Revision ID: 0004

The version before this one goes on working on these tables: it never names the column, whose default is its own format.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("format", sa.Integer(), nullable=False, server_default="1"))


def downgrade() -> None:
    op.drop_column("jobs", "format")
