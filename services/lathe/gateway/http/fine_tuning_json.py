"""Fine-tuning jobs: proto to OpenAI's JSON. Pure."""

from google.protobuf.message import Message

from lathe.common.names import last_id
from lathe.gateway.http.answers import Json, stamp
from lathe.v1 import jobs_pb2 as pb

# OpenAI's clients wait for its own states; the exact one is in `lathe.state`.
_STATUS = {
    pb.JOB_STATE_VALIDATING_FILES: "validating_files",
    pb.JOB_STATE_QUEUED: "queued",
    pb.JOB_STATE_STARTING: "queued",
    pb.JOB_STATE_RUNNING: "running",
    pb.JOB_STATE_PAUSING: "running",
    pb.JOB_STATE_PAUSED: "paused",
    pb.JOB_STATE_PREEMPTING: "running",
    pb.JOB_STATE_CANCELLING: "running",
    pb.JOB_STATE_SUCCEEDED: "succeeded",
    pb.JOB_STATE_FAILED: "failed",
    pb.JOB_STATE_CANCELLED: "cancelled",
}


def job_json(job: pb.Job) -> Json:
    """OpenAI's fine_tuning.job; `lathe` holds what OpenAI has no field for."""
    method = job.method.WhichOneof("method") or "supervised"
    chosen = getattr(job.method, method)
    hyperparameters = _auto_where_unset(chosen.hyperparameters)
    return {
        "id": last_id(job.name),
        "object": "fine_tuning.job",
        "created_at": stamp(job, "create_time") or 0,
        "finished_at": stamp(job, "finish_time"),
        "estimated_finish": stamp(job, "estimated_finish_time"),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model or None,
        "organization_id": job.name.split("/")[1],
        "status": _STATUS.get(job.state, "running"),
        "training_file": last_id(job.training_dataset),
        "validation_file": last_id(job.validation_dataset) or None,
        "result_files": [last_id(name) for name in job.result_files],
        "trained_tokens": job.trained_tokens or None,
        # As OpenAI has it: only supervised jobs show them here too.
        "hyperparameters": hyperparameters if method == "supervised" else None,
        "method": {
            "type": method,
            method: {"hyperparameters": hyperparameters, "lora": _null_where_unset(chosen.lora)},
        },
        "training": _null_where_unset(job.training),
        "seed": job.seed,
        "integrations": [],
        "metadata": dict(job.metadata),
        "error": _error(job.error) if job.HasField("error") else None,
        "user_provided_suffix": job.suffix or None,
        "usage_metrics": None,
        "shared_with_openai": False,
        "eval_id": None,
        "lathe": {
            "state": pb.JobState.Name(job.state).removeprefix("JOB_STATE_").lower(),
            "state_reason": job.state_reason,
            "step": job.step,
            "total_steps": job.total_steps,
            "attempt_count": job.attempt_count,
            "lost_lease_count": job.lost_lease_count,
            "parent_model": job.parent_model or None,
            "rerun_of": last_id(job.rerun_of) or None,
            "comparison": _comparison(job.comparison) if job.HasField("comparison") else None,
            "estimate": _estimate(job.estimate) if job.HasField("estimate") else None,
        },
    }


def _auto_where_unset(given: Message) -> Json:
    return {name: "auto" if value is None else value for name, value in _null_where_unset(given).items()}


def _null_where_unset(given: Message) -> Json:
    found: Json = {}
    for field in given.DESCRIPTOR.fields:
        value = getattr(given, field.name)
        if field.is_repeated:
            found[field.name] = list(value) or None
        else:
            found[field.name] = value if given.HasField(field.name) else None
    return found


def _comparison(given: pb.WeightComparison) -> Json:
    return {
        "bit_identical": given.bit_identical,
        "largest_difference": given.largest_difference,
        "tensor": given.tensor or None,
        "not_compared_reason": given.not_compared_reason or None,
    }


def _estimate(given: pb.JobEstimate) -> Json:
    engine = given.engines[0] if given.engines else pb.EngineEstimate()
    return {
        "tokens": given.tokens,
        "trained_tokens": given.trained_tokens,
        "steps": given.steps,
        "seconds": _range(engine, "seconds"),
        "memory_bytes": _range(engine, "memory_bytes"),
        "price": _range(engine, "price"),
        "currency": given.currency or None,
    }


def _range(engine: pb.EngineEstimate, name: str) -> Json | None:
    if not engine.HasField(name):  # type: ignore[arg-type]
        return None
    found: pb.EstimateRange = getattr(engine, name)
    basis = pb.EstimateBasis.Name(found.basis).removeprefix("ESTIMATE_BASIS_").lower()
    return {"low": found.low, "likely": found.likely, "high": found.high, "basis": basis}


def _error(error: pb.JobError) -> Json:
    return {"code": error.code, "message": error.message, "param": error.param or None}


_LEVELS = {pb.EVENT_LEVEL_WARN: "warn", pb.EVENT_LEVEL_ERROR: "error"}


def event_json(event: pb.JobEvent) -> Json:
    """fine_tuning.job.event; metrics, or the parts of a sentence, are its `data`."""
    is_metrics = event.type == pb.EVENT_TYPE_METRICS
    data: Json = {"kind": event.kind, **event.data} if event.kind else {}
    if is_metrics:
        metrics = event.metrics
        data = {
            "step": metrics.step,
            "total_steps": metrics.total_steps,
            **_losses(metrics),
            "learning_rate": metrics.learning_rate,
            "tokens_per_second": metrics.tokens_per_second,
            "trained_tokens": metrics.trained_tokens,
            "epoch": metrics.epoch,
            **metrics.figures,
        }
    return {
        "id": event.event_id,
        "object": "fine_tuning.job.event",
        "created_at": stamp(event, "create_time") or 0,
        "level": _LEVELS.get(event.level, "info"),
        "message": event.message,
        "type": "metrics" if is_metrics else "message",
        "data": data,
    }


def checkpoint_json(checkpoint: pb.JobCheckpoint) -> Json:
    """fine_tuning.job.checkpoint"""
    return {
        "id": last_id(checkpoint.name),
        "object": "fine_tuning.job.checkpoint",
        "created_at": stamp(checkpoint, "create_time") or 0,
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "fine_tuning_job_id": checkpoint.name.split("/")[3],
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **_losses(checkpoint.metrics)}
        if checkpoint.HasField("metrics")
        else {"step": checkpoint.step},
    }


def _losses(metrics: pb.StepMetrics) -> Json:
    """Validation's numbers are null where a step has none."""
    found: Json = {
        "train_loss": metrics.train_loss,
        "train_mean_token_accuracy": metrics.train_mean_token_accuracy,
        "valid_loss": None,
        "valid_mean_token_accuracy": None,
        "full_valid_loss": None,
        "full_valid_mean_token_accuracy": None,
    }
    found.update(
        (field.name, value)
        for field, value in metrics.ListFields()
        if field.name in found and field.has_presence
    )
    return found
