"""The tables of jobs. The migrations make them; a contract test holds the two equal."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from lathe.common.db import UtcDateTime

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("project", String(64), nullable=False),
    # NULL for a job made without one: NULLs are never equal, so any number of those may exist.
    Column("request_id", String(128)),
    Column("state", String(32), nullable=False),
    Column("lease_token", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("event_sequence", BigInteger, nullable=False),
    Column("create_time", UtcDateTime, nullable=False),
    # Everything else: read and written whole, never searched.
    Column("body", JSON, nullable=False),
    # What the version before this one does not know of a job; it leaves the column as it is.
    Column("extra", JSON(none_as_null=True)),
    # What a replica must know to act on the job; see JOB_FORMAT. One that knows less leaves it alone.
    Column("format", Integer, nullable=False, server_default="1"),
    # Whether what it left in the object store was removed after its end.
    Column("swept", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("project", "request_id", name="jobs_request_id"),
)
Index("jobs_by_project", jobs.c.project, jobs.c.create_time, jobs.c.id)
Index("jobs_by_state", jobs.c.state)
Index("jobs_to_sweep", jobs.c.swept, jobs.c.create_time)

job_metadata = Table(
    "job_metadata",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("project", String(64), primary_key=True),
    Column("lock_count", BigInteger, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("engine_id", String(64), nullable=False),
    Column("lease_token", String(64), nullable=False),
    Column("lease_expire_time", UtcDateTime, nullable=False),
    Column("create_time", UtcDateTime, nullable=False),
    Column("end_time", UtcDateTime),
    # NULL as long as the attempt holds the lease.
    Column("outcome", String(32)),
    Column("final_prefix", Text, nullable=False),
    Column("final_manifest_sha256", String(64), nullable=False),
    Column("trained_tokens", BigInteger, nullable=False),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("error_param", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("code_version", Text, nullable=False),
    Column("receipt", JSON(none_as_null=True)),
    UniqueConstraint("job_id", "number", name="attempts_number"),
)
Index("attempts_by_engine", attempts.c.engine_id)

events = Table(
    "events",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("create_time", UtcDateTime, nullable=False),
    Column("type", String(16), nullable=False),
    Column("level", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("kind", String(32), nullable=False, server_default=""),
    Column("data", JSON(none_as_null=True)),
    UniqueConstraint("job_id", "sequence", name="events_sequence"),
)

metrics = Table(
    "metrics",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("total_steps", Integer, nullable=False),
    # SQLite keeps NaN as NULL, so every measured number may be NULL.
    Column("train_loss", Float(53)),
    Column("train_mean_token_accuracy", Float(53)),
    Column("learning_rate", Float(53)),
    Column("tokens_per_second", Float(53)),
    Column("trained_tokens", BigInteger, nullable=False),
    Column("valid_loss", Float(53)),
    Column("valid_mean_token_accuracy", Float(53)),
    Column("full_valid_loss", Float(53)),
    Column("full_valid_mean_token_accuracy", Float(53)),
    Column("step_seconds", Float(53)),
    Column("grad_norm", Float(53)),
    Column("epoch", Integer, nullable=False),
    Column("figures", JSON(none_as_null=True)),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("create_time", UtcDateTime, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    UniqueConstraint("job_id", "step", name="checkpoints_step"),
)

engines = Table(
    "engines",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("base_id", String(64), nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_time", UtcDateTime, nullable=False),
    Column("launched", Boolean, nullable=False),
    Column("address", Text, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("max_sequences", Integer, nullable=False),
    Column("device", String(32), nullable=False),
    Column("threads", Integer, nullable=False),
    Column("code_version", Text, nullable=False),
    Column("heartbeat_time", UtcDateTime),
    Column("active_sequences", Integer, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("busy_time", UtcDateTime),
    Column("stop_time", UtcDateTime),
    # The defaults are for rows that a version before engine classes writes.
    Column("engine_class", String(64), nullable=False, server_default="default"),
    Column("job_id", String(64), nullable=False, server_default=""),
    Column("waiting_for", Text, nullable=False, server_default=""),
    Column("waiting_time", UtcDateTime),
)

# What each attempt did, summed over its steps: what later jobs are estimated by.
speeds = Table(
    "speeds",
    metadata,
    Column("attempt_id", String(64), primary_key=True),
    Column("base_digest", String(64), nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("method", String(32), nullable=False),
    Column("full_parameter", Boolean, nullable=False),
    Column("workers", Integer, nullable=False),
    Column("engine_class", String(64), nullable=False),
    Column("device", String(32), nullable=False),
    Column("threads", Integer, nullable=False),
    Column("tokens", Float(53), nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("steps", Integer, nullable=False),
    Column("update_time", UtcDateTime, nullable=False),
    Column("held_bytes", BigInteger, nullable=False),
    Column("pass_bytes", BigInteger, nullable=False),
    Column("pass_tokens", Integer, nullable=False),
)
Index("speeds_by_time", speeds.c.update_time)

lost_engines = Table(
    "lost_engines",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("lost_time", UtcDateTime, nullable=False),
)

pools = Table(
    "pools",
    metadata,
    Column("base_digest", String(64), primary_key=True),
    Column("engine_class", String(64), primary_key=True, server_default="default"),
    Column("base_id", String(64), nullable=False),
    Column("demand_time", UtcDateTime),
    Column("start_failures", Integer, nullable=False),
    Column("next_launch_time", UtcDateTime),
    Column("last_error", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
)
