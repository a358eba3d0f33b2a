"""Projects and API keys.

Revision ID: 0001
"""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("display_name", sa.String(128), nullable=False),
        sa.Column("max_running_jobs", sa.Integer, nullable=False),
        sa.Column("max_queued_jobs", sa.Integer, nullable=False),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(128), unique=True),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project", sa.String(32), sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("display_name", sa.String(128), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("hint", sa.String(8), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False, unique=True),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("revoke_time", UtcDateTime()),
        sa.Column("request_id", sa.String(128)),
        sa.UniqueConstraint("project", "request_id"),
    )


def downgrade() -> None:
    op.drop_table("api_keys")
    op.drop_table("projects")
