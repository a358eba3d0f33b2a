"""Base models, their files, claims on what is being deleted, adapters.

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
        "base_models",
        sa.Column("id", sa.String(63), primary_key=True),
        sa.Column("display_name", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, index=True),
        # The digest while READY: two imports of one folder cannot both become READY.
        sa.Column("ready_digest", sa.String(64), unique=True),
        sa.Column("request_key", sa.String(255), unique=True),
        sa.Column("license", sa.Text, nullable=False),
        sa.Column("training_cutoff", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
    )
    op.create_table(
        "base_model_files",
        sa.Column("base_model", sa.String(63), sa.ForeignKey("base_models.id"), primary_key=True),
        sa.Column("path", sa.String(255), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, index=True),
        sa.Column("stored", sa.Boolean, nullable=False),
    )
    op.create_table(
        "claims",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(63), nullable=False, index=True),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("model_id", sa.String(255), nullable=False),
        sa.Column("base_model", sa.String(63), sa.ForeignKey("base_models.id"), nullable=False, index=True),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("lineage", sa.JSON, nullable=False),
        sa.Column("create_time", UtcDateTime(), nullable=False),
        sa.Column("is_final", sa.Boolean, nullable=False),
        sa.Column("deleting", sa.Boolean, nullable=False),
        sa.UniqueConstraint("project", "model_id"),
    )
    op.create_index("adapters_by_time", "adapters", ["project", "create_time", "id"])


def downgrade() -> None:
    for table in ("adapters", "claims", "base_model_files", "base_models"):
        op.drop_table(table)
