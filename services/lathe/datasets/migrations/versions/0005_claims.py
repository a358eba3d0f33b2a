"""Which process holds a claim, and since when.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("claims", sa.Column("holder", sa.String(64), nullable=False, server_default=""))
    op.add_column("claims", sa.Column("time", UtcDateTime()))


def downgrade() -> None:
    for column in ("time", "holder"):
        op.drop_column("claims", column)
