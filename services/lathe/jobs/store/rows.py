"""Rows of the database to models and back. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any

from lathe.common.errors import Unavailable
from lathe.jobs import model
from lathe.jobs.figures import Basis, EngineEstimate, JobEstimate, Range, Speed, Work
from lathe.jobs.model import (
    AdapterObject,
    Attempt,
    BaseRef,
    Checkpoint,
    ComputeSpec,
    DatasetRef,
    EngineReceipt,
    EngineRecord,
    EngineState,
    EventLevel,
    EventType,
    Job,
    JobError,
    JobEvent,
    JobState,
    Outcome,
    Pool,
    SlicePlan,
    StepMetrics,
    TokenObject,
    WeightComparison,
)
from lathe.jobs.ports import NEWER_JOB
from lathe.jobs.training import Hyperparameters, Method, TrainingSpec

Row = Mapping[str, Any]

_JOB_COLUMNS = frozenset(
    {"id", "project", "state", "lease_token", "version", "event_sequence", "create_time"}
)
# The highest format of a job that this version knows. A version that adds what the one before must not overlook (a
# method, a state) raises it and writes it, in the column `format`, for the jobs that have it.
JOB_FORMAT = 1
# What version 0.1 knows of a job is in `body`, all else in `extra`: it reads a member of a member that it does not know
# as an error, and drops a member that it does not know when it writes the body.
_EXTRA = frozenset(
    {"parent_model", "rerun_of", "halvings", "compare_with", "comparison", "estimate", "turn_time"}
)
_BODY_OF = {
    "spec": frozenset(
        {"n_epochs", "batch_size", "learning_rate_multiplier", "lora_r", "lora_alpha", "target_modules"}
    ),
    "hyperparameters": frozenset(
        {
            "n_epochs",
            "batch_size",
            "learning_rate_multiplier",
            "learning_rate",
            "lora_r",
            "lora_alpha",
            "target_modules",
            "warmup_fraction",
            "weight_decay",
            "max_grad_norm",
        }
    ),
    "compute": frozenset({"engine_class", "dedicated"}),
}


def storable(text: str) -> str:
    """The text as PostgreSQL can keep it: a NUL, which a sampled answer may have, becomes U+FFFD."""
    return text.replace("\0", "\ufffd")


def _time(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None


def _lists_to_tuples(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}


def _of_method(value: Mapping[str, Any]) -> dict[str, Any]:
    return _lists_to_tuples(value) | {"method": Method(value.get("method", Method.SUPERVISED))}


def _halvings(value: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((step, times) for step, times in value)


def _range(value: Mapping[str, Any] | None) -> Range | None:
    return Range(**{**value, "basis": Basis(value["basis"])}) if value else None


def _engine_estimate(value: Mapping[str, Any]) -> EngineEstimate:
    ranges = {name: _range(value[name]) for name in ("seconds", "memory_bytes", "price")}
    return EngineEstimate(**{**value, **ranges})


def _estimate(value: Mapping[str, Any]) -> JobEstimate:
    return JobEstimate(**{**value, "engines": tuple(map(_engine_estimate, value["engines"]))})


# How a member of the body is read again; what is not named here is a plain value.
_READERS: dict[str, Callable[[Any], Any]] = {
    "base": lambda v: BaseRef(**_lists_to_tuples(v)),
    "training": lambda v: DatasetRef(**v),
    "validation": lambda v: DatasetRef(**v),
    "compute": lambda v: ComputeSpec(**v),
    "spec": lambda v: TrainingSpec(**_of_method(v)),
    "hyperparameters": lambda v: Hyperparameters(**_of_method(v)),
    "halvings": _halvings,
    "compare_with": lambda v: AdapterObject(**v),
    "comparison": lambda v: WeightComparison(**v),
    "estimate": _estimate,
    "initial_adapter": lambda v: AdapterObject(**v),
    "training_tokens": lambda v: TokenObject(**v),
    "validation_tokens": lambda v: TokenObject(**v),
    "slice_plan": lambda v: SlicePlan(**v),
    "error": lambda v: JobError(**v),
    "result_files": tuple,
    "queue_time": _time,
    "start_time": _time,
    "finish_time": _time,
    "estimated_finish_time": _time,
    "hold_until": _time,
    "turn_time": _time,
}


def job_values(job: Job) -> dict[str, Any]:
    """The columns of a job; event_sequence apart, which only the store moves."""
    whole = asdict(job)
    body = {key: value for key, value in whole.items() if key not in _JOB_COLUMNS}
    for key, value in body.items():
        if isinstance(value, datetime):
            body[key] = value.isoformat()
    extra = {key: body.pop(key) for key in _EXTRA}
    for key, known in _BODY_OF.items():
        if body[key] is not None:
            extra[key] = {name: value for name, value in body[key].items() if name not in known}
            body[key] = {name: value for name, value in body[key].items() if name in known}
    return {
        "id": job.id,
        "project": job.project,
        "state": str(job.state),
        "lease_token": job.lease_token,
        "version": job.version,
        "create_time": job.create_time,
        "body": body,
        "extra": extra,
    }


def job(row: Row) -> Job:
    """Raises Unavailable for a job that only a newer version can read: its replicas answer."""
    if row["format"] > JOB_FORMAT:
        raise Unavailable(
            f"projects/{row['project']}/jobs/{row['id']} was written by a newer version than this replica of jobs has; "
            "ask again, and finish the upgrade.",
            reason=NEWER_JOB,
            retry_after=1.0,
        )
    known = {item.name for item in fields(Job)}
    # A body that a newer version wrote may have members that this one does not know: leave them out.
    body = {key: value for key, value in row["body"].items() if key in known}
    for key, value in (row["extra"] or {}).items():
        if key in _EXTRA:
            body[key] = value
        elif body.get(key) is not None:
            body[key] |= value
    if _resolved_without_knowing(row):
        body["hyperparameters"] = None
    for key, read in _READERS.items():
        if body.get(key) is not None:
            body[key] = read(body[key])
    return Job(
        id=row["id"],
        project=row["project"],
        state=JobState(row["state"]),
        lease_token=row["lease_token"],
        version=row["version"],
        event_sequence=row["event_sequence"],
        create_time=row["create_time"],
        **body,
    )


def _resolved_without_knowing(row: Row) -> bool:
    """Whether version 0.1 chose the hyperparameters of a waiting job, by the members of the spec that it knows."""
    extra = row["extra"] or {}
    waits = row["state"] in (JobState.QUEUED, JobState.PAUSED)
    return waits and "spec" in extra and "hyperparameters" not in extra


def attempt_values(attempt: Attempt) -> dict[str, Any]:
    final = attempt.final_adapter or AdapterObject("", "")
    error = attempt.error or JobError("", "")
    return {
        "id": attempt.id,
        "job_id": attempt.job_id,
        "number": attempt.number,
        "engine_id": attempt.engine_id,
        "lease_token": attempt.lease_token,
        "lease_expire_time": attempt.lease_expire_time,
        "create_time": attempt.create_time,
        "end_time": attempt.end_time,
        "outcome": str(attempt.outcome) if attempt.outcome is not None else None,
        "final_prefix": final.prefix,
        "final_manifest_sha256": final.manifest_sha256,
        "trained_tokens": attempt.trained_tokens,
        "error_code": storable(error.code),
        "error_message": storable(error.message),
        "error_param": storable(error.param),
        "step": attempt.step,
        "code_version": attempt.code_version,
        "receipt": asdict(attempt.receipt) if attempt.receipt is not None else None,
    }


def attempt(row: Row) -> Attempt:
    final = AdapterObject(row["final_prefix"], row["final_manifest_sha256"])
    return Attempt(
        id=row["id"],
        job_id=row["job_id"],
        number=row["number"],
        engine_id=row["engine_id"],
        lease_token=row["lease_token"],
        lease_expire_time=row["lease_expire_time"],
        create_time=row["create_time"],
        end_time=row["end_time"],
        outcome=Outcome(row["outcome"]) if row["outcome"] else None,
        final_adapter=final if final.prefix else None,
        trained_tokens=row["trained_tokens"],
        error=JobError(row["error_code"], row["error_message"], row["error_param"])
        if row["error_code"]
        else None,
        step=row["step"],
        code_version=row["code_version"],
        receipt=_receipt(row["receipt"]),
    )


def _receipt(value: Mapping[str, Any] | None) -> EngineReceipt | None:
    return EngineReceipt(**{**value, "halvings": _halvings(value["halvings"])}) if value else None


_OPTIONAL_METRICS = (
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def metrics(row: Row) -> StepMetrics:
    values = {item.name: row[item.name] for item in fields(StepMetrics)}
    for name, value in values.items():
        if value is None and name not in _OPTIONAL_METRICS:
            values[name] = math.nan
    values["figures"] = {name: float(value) for name, value in (row["figures"] or {}).items()}
    return StepMetrics(**values)


def metrics_values(job_id: str, item: StepMetrics) -> dict[str, Any]:
    # JSON has no NaN and no infinity: such a figure is left out.
    figures = {name: value for name, value in item.figures.items() if math.isfinite(value)}
    return {"job_id": job_id, **asdict(item), "figures": figures or None}


def event(row: Row, of_step: StepMetrics | None) -> JobEvent:
    return JobEvent(
        id=row["id"],
        job_id=row["job_id"],
        sequence=row["sequence"],
        create_time=row["create_time"],
        message=row["message"],
        type=EventType(row["type"]),
        level=EventLevel(row["level"]),
        step=row["step"],
        metrics=of_step,
        kind=row["kind"],
        data=row["data"] or {},
    )


def checkpoint(row: Row, of_step: StepMetrics | None) -> Checkpoint:
    return Checkpoint(
        id=row["id"],
        job_id=row["job_id"],
        step=row["step"],
        create_time=row["create_time"],
        object=AdapterObject(row["prefix"], row["manifest_sha256"]),
        metrics=of_step,
    )


def checkpoint_values(item: Checkpoint) -> dict[str, Any]:
    return {
        "id": item.id,
        "job_id": item.job_id,
        "step": item.step,
        "create_time": item.create_time,
        "prefix": item.object.prefix,
        "manifest_sha256": item.object.manifest_sha256,
    }


_WORK = tuple(item.name for item in fields(Work))


def speed(row: Row) -> Speed:
    names = [item.name for item in fields(Speed) if item.name != "work"]
    return Speed(work=Work(**{name: row[name] for name in _WORK}), **{name: row[name] for name in names})


def speed_values(item: Speed) -> dict[str, Any]:
    values = asdict(item)
    return {**values.pop("work"), **values}


def engine(row: Row) -> EngineRecord:
    values = {
        item.name: row[item.name] for item in fields(EngineRecord) if item.name not in ("base", "state")
    }
    return EngineRecord(
        base=BaseRef(row["base_id"], row["base_digest"]), state=EngineState(row["state"]), **values
    )


def engine_values(record: EngineRecord) -> dict[str, Any]:
    values = {item.name: getattr(record, item.name) for item in fields(EngineRecord) if item.name != "base"}
    return {
        **values,
        "state": str(record.state),
        "base_id": record.base.id,
        "base_digest": record.base.digest,
    }


def pool(row: Row) -> Pool:
    return Pool(
        base=BaseRef(row["base_id"], row["base_digest"]),
        engine_class=row["engine_class"],
        demand_time=row["demand_time"],
        start_failures=row["start_failures"],
        next_launch_time=row["next_launch_time"],
        last_error=row["last_error"],
        version=row["version"],
    )


def pool_values(item: Pool) -> dict[str, Any]:
    return {
        "base_digest": item.base.digest,
        "engine_class": item.engine_class,
        "base_id": item.base.id,
        "demand_time": item.demand_time,
        "start_failures": item.start_failures,
        "next_launch_time": item.next_launch_time,
        "last_error": storable(item.last_error),
        "version": item.version,
    }


def new_event_values(job_id: str, event_id: str, sequence: int, now: datetime, new: model.NewEvent) -> Row:
    return {
        "id": event_id,
        "job_id": job_id,
        "sequence": sequence,
        "create_time": now,
        "type": str(new.type),
        "level": str(new.level),
        "message": storable(new.message),
        "step": new.step,
        "kind": storable(new.kind),
        "data": {storable(key): storable(value) for key, value in new.data.items()} or None,
    }
