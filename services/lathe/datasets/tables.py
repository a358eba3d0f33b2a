"""The tables of datasets, audits, uploads, imports and claims."""

from __future__ import annotations

import sqlalchemy as sa

from lathe.common.db import UtcDateTime

metadata = sa.MetaData()

datasets = sa.Table(
    "datasets",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("display_name", sa.String),
    sa.Column("purpose", sa.String),
    sa.Column("state", sa.String),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("expire_time", UtcDateTime()),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("sha256", sa.String),
    sa.Column("report", sa.JSON),
    sa.Column("staging_key", sa.String),
    sa.Column("request_key", sa.String),
    sa.Column("preparation", sa.JSON(none_as_null=True)),
    sa.Column("index_version", sa.Integer, default=0),
    sa.Column("frozen_as", sa.String),
    sa.Column("import_options", sa.JSON(none_as_null=True)),
    sa.Column("source", sa.String, default=""),
    sa.Column("source_sha256", sa.String),
    sa.Column("source_size_bytes", sa.BigInteger),
)
audits = sa.Table(
    "audits",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("state", sa.String),
    sa.Column("dataset_sha256", sa.String),
    sa.Column("base_model", sa.String),
    sa.Column("tokenizer_digest", sa.String),
    sa.Column("template_digest", sa.String),
    sa.Column("options", sa.JSON),
    sa.Column("files", sa.JSON),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("use_time", UtcDateTime()),
    sa.Column("report", sa.JSON),
    sa.Column("sha256", sa.String),
    sa.Column("rows", sa.BigInteger),
    sa.Column("tokens", sa.BigInteger),
    sa.Column("trained_tokens", sa.BigInteger),
    sa.Column("truncated_rows", sa.BigInteger),
    sa.Column("max_row_tokens", sa.Integer),
    sa.Column("findings_sha256", sa.String),
    sa.Column("compared", sa.JSON(none_as_null=True)),
    sa.Column("begins", sa.Integer, default=0),
)
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("dataset_id", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("display_name", sa.String),
    sa.Column("purpose", sa.String),
    sa.Column("state", sa.String),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("sha256", sa.String),
    sa.Column("md5", sa.String),
    sa.Column("parts", sa.JSON),
    sa.Column("create_time", UtcDateTime()),
    sa.Column("expire_time", UtcDateTime()),
)
imports = sa.Table(
    "imports",
    metadata,
    sa.Column("dataset_id", sa.String, primary_key=True),
    sa.Column("project", sa.String),
    sa.Column("source", sa.String),
    sa.Column("tries", sa.Integer),
    sa.Column("next_time", UtcDateTime()),
)
claims = sa.Table(
    "claims",
    metadata,
    sa.Column("sha256", sa.String, primary_key=True),
    sa.Column("owner", sa.String),
    sa.Column("holder", sa.String, default=""),
    sa.Column("time", UtcDateTime()),
)
overlaps = sa.Table(
    "overlaps",
    metadata,
    sa.Column("frozen_sha256", sa.String, primary_key=True),
    sa.Column("dataset_sha256", sa.String, primary_key=True),
    sa.Column("count", sa.BigInteger),
    sa.Column("lines", sa.JSON),
)
