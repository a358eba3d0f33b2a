"""Which jobs' files were swept after their end.

Revision ID: 0006

The version before this one goes on working on these tables: it never names the column. What it ends is swept later.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("swept", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("jobs_to_sweep", "jobs", ["swept", "create_time"])


def downgrade() -> None:
    op.drop_index("jobs_to_sweep", "jobs")
    op.drop_column("jobs", "swept")
