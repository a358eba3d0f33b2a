"""What each attempt did, for estimates.

Revision ID: 0005

The version before this one goes on working on these tables: it never names the new one.
"""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "speeds",
        sa.Column("attempt_id", sa.String(length=64), primary_key=True),
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("full_parameter", sa.Boolean(), nullable=False),
        sa.Column("workers", sa.Integer(), nullable=False),
        sa.Column("engine_class", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=32), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.Float(precision=53), nullable=False),
        sa.Column("seconds", sa.Float(precision=53), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("update_time", UtcDateTime(), nullable=False),
        sa.Column("held_bytes", sa.BigInteger(), nullable=False),
        sa.Column("pass_bytes", sa.BigInteger(), nullable=False),
        sa.Column("pass_tokens", sa.Integer(), nullable=False),
    )
    op.create_index("speeds_by_time", "speeds", ["update_time"])


def downgrade() -> None:
    op.drop_table("speeds")
