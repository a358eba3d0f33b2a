"""Fine-tuning jobs: OpenAI's JSON to proto and back. Pure."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lathe.common.names import DATASET, PROJECT, last_id
from lathe.gateway.http.answers import Json, stamp
from lathe.gateway.http.errors import invalid, unsupported
from lathe.gateway.http.requests import Model
from lathe.v1 import jobs_pb2 as pb


def _auto(value: object) -> object:
    return None if value == "auto" else value


Epochs = Annotated[Annotated[int, Field(ge=1, le=50)] | None, BeforeValidator(_auto)]
BatchSize = Annotated[Annotated[int, Field(ge=1, le=256)] | None, BeforeValidator(_auto)]
Multiplier = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_auto)]


class Hyperparameters(Model):
    """ "auto", null and absent mean the same."""

    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class Lora(Model):
    """Lathe's own: PEFT's LoraConfig."""

    r: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    target_modules: list[str] | None = None


class Supervised(Model):
    hyperparameters: Hyperparameters | None = None
    lora: Lora | None = None


class Method(Model):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class JobBody(Model):
    """POST /v1/fine_tuning/jobs"""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None


def job_fields(body: JobBody) -> tuple[tuple[str, str], ...]:
    """gRPC's fields by the names that this request used, for errors."""
    supervised = "job.method.supervised"
    given = "hyperparameters" if body.hyperparameters is not None else "method.supervised.hyperparameters"
    return (
        (f"{supervised}.hyperparameters", given),
        (f"{supervised}.lora", "method.supervised.lora"),
        ("job.training_dataset", "training_file"),
        ("job.validation_dataset", "validation_file"),
        *((f"job.{name}", name) for name in ("model", "suffix", "seed", "metadata", "method")),
    )


def job_request(body: JobBody, project: str, request_id: str) -> pb.CreateJobRequest:
    """Raises Unimplemented for what Lathe does not offer, InvalidArgument for what contradicts itself."""
    _refuse_unsupported(body)
    job = pb.Job(
        model=body.model,
        training_dataset=_dataset(project, body.training_file, "training_file"),
        suffix=body.suffix or "",
        seed=body.seed,
        method=pb.Method(supervised=_supervised(body)),
        metadata=body.metadata or {},
    )
    if body.validation_file is not None:
        job.validation_dataset = _dataset(project, body.validation_file, "validation_file")
    return pb.CreateJobRequest(parent=PROJECT.format(project), job=job, request_id=request_id)


def _refuse_unsupported(body: JobBody) -> None:
    if body.integrations:
        raise unsupported("integrations", "integrations are not supported yet; leave them out.")
    if body.method is None:
        return
    if body.method.type != "supervised":
        message = f"method.type '{body.method.type}' is not supported yet; 'supervised' is."
        raise unsupported("method.type", message)
    for name in ("dpo", "reinforcement"):
        if getattr(body.method, name) is not None:
            raise invalid(f"method.{name}", f"method.{name} does not go with method.type 'supervised'.")


def _supervised(body: JobBody) -> pb.SupervisedMethod:
    given = body.method.supervised if body.method is not None else None
    numbers = given.hyperparameters if given is not None else None
    if numbers is not None and body.hyperparameters is not None:
        raise invalid(
            "hyperparameters",
            "hyperparameters is deprecated: give method.supervised.hyperparameters alone.",
        )
    numbers = numbers or body.hyperparameters or Hyperparameters()
    lora = (given.lora if given is not None else None) or Lora()
    return pb.SupervisedMethod(
        hyperparameters=pb.SupervisedHyperparameters(
            n_epochs=numbers.n_epochs,
            batch_size=numbers.batch_size,
            learning_rate_multiplier=numbers.learning_rate_multiplier,
        ),
        lora=pb.LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules or []),
    )


def _dataset(project: str, file_id: str, field: str) -> str:
    if not DATASET.matches(f"projects/{project}/datasets/{file_id}"):
        raise invalid(field, f"Invalid value for '{field}': {file_id[:100]!r} is no file id.")
    return DATASET.format(project, file_id)


# --- answers ----------------------------------------------------------------------------------------------

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
    hyperparameters = _hyperparameters(job.method.supervised.hyperparameters)
    lora = job.method.supervised.lora
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
        "hyperparameters": hyperparameters,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": hyperparameters, "lora": _lora(lora)},
        },
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
        },
    }


def _hyperparameters(given: pb.SupervisedHyperparameters) -> Json:
    return {
        "n_epochs": given.n_epochs if given.HasField("n_epochs") else "auto",
        "batch_size": given.batch_size if given.HasField("batch_size") else "auto",
        "learning_rate_multiplier": (
            given.learning_rate_multiplier if given.HasField("learning_rate_multiplier") else "auto"
        ),
    }


def _lora(given: pb.LoraConfig) -> Json:
    return {
        "r": given.r if given.HasField("r") else None,
        "lora_alpha": given.lora_alpha if given.HasField("lora_alpha") else None,
        "target_modules": list(given.target_modules) or None,
    }


def _error(error: pb.JobError) -> Json:
    return {"code": error.code, "message": error.message, "param": error.param or None}


_LEVELS = {pb.EVENT_LEVEL_WARN: "warn", pb.EVENT_LEVEL_ERROR: "error"}


def event_json(event: pb.JobEvent) -> Json:
    """fine_tuning.job.event; metrics are its `data`."""
    is_metrics = event.type == pb.EVENT_TYPE_METRICS
    data: Json = {}
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
