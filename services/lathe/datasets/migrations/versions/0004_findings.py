"""The findings of audits by line, and what a training and a validation file both hold.

Revision ID: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audits", sa.Column("findings_sha256", sa.String(64), nullable=False, server_default=""))
    op.add_column("audits", sa.Column("compared", sa.JSON))
    op.create_index("audits_by_findings", "audits", ["findings_sha256"])


def downgrade() -> None:
    op.drop_index("audits_by_findings", "audits")
    op.drop_column("audits", "compared")
    op.drop_column("audits", "findings_sha256")
