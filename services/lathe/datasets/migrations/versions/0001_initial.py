"""Datasets, audits, claims on blobs that are being deleted.

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
        "datasets",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("display_name", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("expire_time", UtcDateTime(), index=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, index=True),
        sa.Column("report", sa.JSON),
        sa.Column("staging_key", sa.String(255), nullable=False),
        sa.Column("request_key", sa.String(160)),
        sa.UniqueConstraint("project", "request_key"),
    )
    op.create_index("datasets_by_time", "datasets", ["project", "create_time", "id"])
    op.create_table(
        "audits",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("dataset_sha256", sa.String(64), nullable=False, index=True),
        sa.Column("base_model", sa.String(128), nullable=False),
        sa.Column("tokenizer_digest", sa.String(64), nullable=False),
        sa.Column("template_digest", sa.String(64), nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("use_time", UtcDateTime(), nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, index=True),
        sa.Column("rows", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("trained_tokens", sa.BigInteger, nullable=False),
        sa.Column("truncated_rows", sa.BigInteger, nullable=False),
        sa.Column("max_row_tokens", sa.Integer, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
    )


def downgrade() -> None:
    for table in ("claims", "audits", "datasets"):
        op.drop_table(table)
