"""The method that made an adapter, and the adapter that it goes on from.

Revision ID: 0002

The version before this one goes on working on these tables: the new column may be empty.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapters", sa.Column("ancestry", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("adapters", "ancestry")
