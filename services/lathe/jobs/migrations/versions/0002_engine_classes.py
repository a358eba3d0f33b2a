"""Engine classes and dedicated engines; what a launching engine waits for; engines that were given up.

Revision ID: 0002

The version before this one goes on working on these tables: every new column has a default.
"""

import sqlalchemy as sa
from alembic import op

from lathe.common.db import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_POOL = "base_id, base_digest, demand_time, start_failures, next_launch_time, last_error, version"


def upgrade() -> None:
    op.add_column(
        "engines",
        sa.Column("engine_class", sa.String(length=64), nullable=False, server_default="default"),
    )
    op.add_column("engines", sa.Column("job_id", sa.String(length=64), nullable=False, server_default=""))
    op.add_column("engines", sa.Column("waiting_for", sa.Text(), nullable=False, server_default=""))
    op.add_column("engines", sa.Column("waiting_time", UtcDateTime(), nullable=True))
    op.create_table(
        "lost_engines",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("lost_time", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    _remake_pools(sa.Column("engine_class", sa.String(length=64), nullable=False, server_default="default"))


def _remake_pools(*key: sa.Column[str]) -> None:
    """The primary key changes, which SQLite cannot do to a table that is there."""
    op.rename_table("pools", "old_pools")
    op.create_table(
        "pools",
        sa.Column("base_digest", sa.String(length=64), nullable=False),
        *key,
        sa.Column("base_id", sa.String(length=64), nullable=False),
        sa.Column("demand_time", UtcDateTime(), nullable=True),
        sa.Column("start_failures", sa.Integer(), nullable=False),
        sa.Column("next_launch_time", UtcDateTime(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("base_digest", *(column.name for column in key)),
    )
    op.execute(f"INSERT INTO pools ({_POOL}) SELECT {_POOL} FROM old_pools")
    op.drop_table("old_pools")


def downgrade() -> None:
    # The version before has one pool for each base.
    op.execute("DELETE FROM pools WHERE engine_class <> 'default'")
    _remake_pools()
    op.drop_table("lost_engines")
    for name in ("waiting_time", "waiting_for", "job_id", "engine_class"):
        op.drop_column("engines", name)
