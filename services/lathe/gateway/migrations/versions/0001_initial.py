"""Deployments, and the creates of the HTTP door.

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
        "deployments",
        sa.Column("name", sa.String(160), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("update_time", UtcDateTime(), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(128)),
        sa.UniqueConstraint("project", "request_id"),
    )
    op.create_table(
        "idempotency",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("path", sa.String(255), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", UtcDateTime(), nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("body", sa.LargeBinary),
    )
    op.create_index("idempotency_by_request", "idempotency", ["key_id", "path", "digest", "created"])
    op.create_index("idempotency_by_age", "idempotency", ["created"])


def downgrade() -> None:
    op.drop_table("idempotency")
    op.drop_table("deployments")
