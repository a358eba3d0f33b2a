"""Rows of held-out sets are looked for anew: also those that came back with a verdict on them.

Revision ID: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # What was found is kept only so that it need not be looked for twice.
    op.execute(sa.delete(sa.table("overlaps")))


def downgrade() -> None:
    pass
