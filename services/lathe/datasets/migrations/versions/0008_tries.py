"""How often an audit was begun, so that one that ends its process is given up.

Revision ID: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audits", sa.Column("begins", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("audits", "begins")
