"""Messages of jobs.proto and worker.proto to models and back."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lathe.common import names
from lathe.common.errors import FieldViolation, InvalidArgument, NotFound
from lathe.jobs import estimateprotos, model, progress, reports, trainingprotos, workers
from lathe.jobs.model import (
    AdapterObject,
    Checkpoint,
    ComputeSpec,
    EngineReceipt,
    EngineRecord,
    EventLevel,
    EventType,
    Job,
    JobError,
    JobEvent,
    JobState,
    Outcome,
    SlicePlan,
    StepMetrics,
    TokenObject,
    WeightComparison,
)
from lathe.jobs.requests import JobRequest
from lathe.v1 import jobs_pb2, models_pb2, worker_pb2

STATES = {state: getattr(jobs_pb2, f"JOB_STATE_{state.name}") for state in JobState}
STATE_OF = {number: state for state, number in STATES.items()}
_EVENT_TYPES = {
    EventType.MESSAGE: jobs_pb2.EVENT_TYPE_MESSAGE,
    EventType.METRICS: jobs_pb2.EVENT_TYPE_METRICS,
}
_EVENT_LEVELS = {
    EventLevel.INFO: jobs_pb2.EVENT_LEVEL_INFO,
    EventLevel.WARN: jobs_pb2.EVENT_LEVEL_WARN,
    EventLevel.ERROR: jobs_pb2.EVENT_LEVEL_ERROR,
}
ACTIONS = {
    model.Action.CANCEL: worker_pb2.DIRECTIVE_ACTION_CANCEL,
    model.Action.PAUSE: worker_pb2.DIRECTIVE_ACTION_PAUSE,
    model.Action.PREEMPT: worker_pb2.DIRECTIVE_ACTION_PREEMPT,
    model.Action.LEASE_LOST: worker_pb2.DIRECTIVE_ACTION_LEASE_LOST,
}
_OUTCOMES = {
    worker_pb2.ATTEMPT_OUTCOME_SUCCEEDED: Outcome.SUCCEEDED,
    worker_pb2.ATTEMPT_OUTCOME_FAILED: Outcome.FAILED,
    worker_pb2.ATTEMPT_OUTCOME_RELEASED: Outcome.RELEASED,
    worker_pb2.ATTEMPT_OUTCOME_CANCELLED: Outcome.CANCELLED,
    worker_pb2.ATTEMPT_OUTCOME_RETRYABLE: Outcome.RETRYABLE,
    worker_pb2.ATTEMPT_OUTCOME_WORKER_LOST: Outcome.LOST,
}


def _invalid(path: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, violations=[FieldViolation(path, message)])


def _stamp(target: Timestamp, time: datetime | None) -> None:
    if time is not None:
        target.FromDatetime(time)


# --- what users send ---


def job_request(request: jobs_pb2.CreateJobRequest) -> JobRequest:
    """Raises InvalidArgument for names of another shape, NotFound for another project's dataset."""
    (project,) = names.PROJECT.parse(request.parent, field="parent")
    job = request.job
    return JobRequest(
        project=project,
        model=job.model,
        training=_dataset_id(job.training_dataset, project, "training"),
        validation=_dataset_id(job.validation_dataset, project, "validation"),
        suffix=job.suffix,
        seed=job.seed if job.HasField("seed") else None,
        spec=trainingprotos.spec(job),
        compute=ComputeSpec(job.compute.engine_class, job.compute.dedicated, job.compute.workers or 1),
        metadata=dict(job.metadata),
        request_id=request.request_id,
    )


def _dataset_id(name: str, project: str, kind: str) -> str:
    if not name:
        return ""
    path = f"job.{kind}_dataset"
    owner, dataset = names.DATASET.parse(name, field=path)
    if owner != project:
        # In the words of a file that does not exist.
        text = f"The {kind} file {dataset} does not exist."
        raise NotFound(text, violations=[FieldViolation(path, text)])
    return dataset


def states(numbers: list[int]) -> list[JobState]:
    """Raises InvalidArgument for a state that there is not."""
    unknown = [number for number in numbers if number not in STATE_OF]
    if unknown:
        raise _invalid("states", f"states: {unknown[0]} is no state of a job.")
    return [STATE_OF[number] for number in numbers]


# --- what users get ---


def job_pb(job: Job) -> jobs_pb2.Job:
    message = jobs_pb2.Job(
        name=job.name,
        model=job.model,
        training_dataset=names.DATASET.format(job.project, job.training.id),
        validation_dataset=names.DATASET.format(job.project, job.validation.id) if job.validation else "",
        suffix=job.suffix,
        seed=job.seed,
        method=trainingprotos.method_pb(job),
        training=trainingprotos.options_pb(job),
        metadata=dict(job.metadata),
        state=STATES[job.state],
        state_reason=job.state_reason,
        fine_tuned_model=job.fine_tuned_model,
        trained_tokens=job.trained_tokens,
        result_files=[names.DATASET.format(job.project, file) for file in job.result_files],
        error=error_pb(job.error) if job.error is not None else None,
        attempt_count=job.attempt_count,
        lost_lease_count=job.lost_lease_count,
        step=job.step,
        total_steps=job.total_steps,
        etag=job.etag,
        compute=jobs_pb2.ComputeSpec(**asdict(job.compute)),
        parent_model=job.parent_model,
        rerun_of=names.JOB.format(job.project, job.rerun_of) if job.rerun_of else "",
        comparison=comparison_pb(job.comparison) if job.comparison is not None else None,
        estimate=estimateprotos.estimate_pb(job.estimate) if job.estimate is not None else None,
    )
    _stamp(message.create_time, job.create_time)
    for field, time in (
        ("start_time", job.start_time),
        ("finish_time", job.finish_time),
        ("estimated_finish_time", job.estimated_finish_time),
    ):
        if time is not None:
            _stamp(getattr(message, field), time)
    return message


def comparison_pb(comparison: WeightComparison) -> jobs_pb2.WeightComparison:
    return jobs_pb2.WeightComparison(**asdict(comparison))


def error_pb(error: JobError) -> jobs_pb2.JobError:
    return jobs_pb2.JobError(code=error.code, message=error.message, param=error.param)


def metrics_pb(metrics: StepMetrics) -> jobs_pb2.StepMetrics:
    return jobs_pb2.StepMetrics(**{key: value for key, value in asdict(metrics).items() if value is not None})


def event_pb(event: JobEvent) -> jobs_pb2.JobEvent:
    message = jobs_pb2.JobEvent(
        event_id=event.id,
        sequence=event.sequence,
        type=_EVENT_TYPES[event.type],
        level=_EVENT_LEVELS[event.level],
        message=event.message,
        metrics=metrics_pb(event.metrics) if event.metrics is not None else None,
        kind=event.kind,
        data=dict(event.data),
    )
    _stamp(message.create_time, event.create_time)
    return message


def checkpoint_pb(job: Job, checkpoint: Checkpoint) -> jobs_pb2.JobCheckpoint:
    message = jobs_pb2.JobCheckpoint(
        name=names.CHECKPOINT.format(job.project, job.id, checkpoint.id),
        step=checkpoint.step,
        model_id=model.checkpoint_model_id(job, checkpoint.step),
        metrics=metrics_pb(checkpoint.metrics) if checkpoint.metrics is not None else None,
        object=_object_pb(checkpoint.object),
    )
    _stamp(message.create_time, checkpoint.create_time)
    return message


def engine_pb(engine: EngineRecord) -> jobs_pb2.ServingEngine:
    return jobs_pb2.ServingEngine(
        engine_id=engine.id,
        address=engine.address,
        base_model=engine.base.name,
        base_digest=engine.base.digest,
        max_sequences=engine.max_sequences,
        active_sequences=engine.active_sequences,
        draining=engine.draining,
    )


# --- what engines send and get ---


def registration(request: worker_pb2.RegisterRequest) -> workers.Registration:
    (base_id,) = names.BASE_MODEL.parse(request.base_model, field="base_model")
    capacity = request.capacity
    return workers.Registration(
        engine_id=request.engine_id,
        base=model.BaseRef(base_id, request.base_digest),
        address=request.address,
        max_attempts=capacity.max_attempts,
        max_sequences=capacity.max_sequences,
        device=capacity.device,
        threads=capacity.threads,
        code_version=request.code_version,
        engine_class=request.engine_class,
        job_id=request.job_id,
    )


def beat(request: worker_pb2.HeartbeatRequest) -> workers.Beat:
    return workers.Beat(
        engine_id=request.engine_id,
        leases=[(lease.attempt_id, lease.lease_token) for lease in request.leases],
        active_sequences=request.active_sequences,
        memory_bytes=request.memory_bytes,
        draining=request.draining,
        config_version=request.config_version,
    )


def progress_of(request: worker_pb2.ReportProgressRequest) -> progress.Progress:
    return progress.Progress(
        attempt_id=request.attempt_id,
        lease_token=request.lease_token,
        metrics=[_metrics(row, request.total_steps) for row in request.metrics],
        checkpoints=[
            progress.ReportedCheckpoint(
                point.step,
                AdapterObject(point.object.prefix, point.object.manifest_sha256),
                _metrics(point.metrics, request.total_steps) if point.HasField("metrics") else None,
            )
            for point in request.checkpoints
        ],
        slice_plan=_plan(request.slice_plan) if request.HasField("slice_plan") else None,
        total_steps=request.total_steps,
        notes=[progress.Note(note.step, note.kind, note.message, dict(note.data)) for note in request.notes],
        dropped_checkpoints=list(request.dropped_checkpoints),
    )


def _metrics(row: jobs_pb2.StepMetrics, total_steps: int) -> StepMetrics:
    def optional(name: str) -> float | None:
        return float(getattr(row, name)) if row.HasField(name) else None  # type: ignore[arg-type]

    return StepMetrics(
        step=row.step,
        total_steps=row.total_steps or total_steps,
        train_loss=row.train_loss,
        train_mean_token_accuracy=row.train_mean_token_accuracy,
        learning_rate=row.learning_rate,
        tokens_per_second=row.tokens_per_second,
        trained_tokens=row.trained_tokens,
        valid_loss=optional("valid_loss"),
        valid_mean_token_accuracy=optional("valid_mean_token_accuracy"),
        full_valid_loss=optional("full_valid_loss"),
        full_valid_mean_token_accuracy=optional("full_valid_mean_token_accuracy"),
        step_seconds=row.step_seconds,
        grad_norm=row.grad_norm,
        epoch=row.epoch,
        figures=dict(row.figures),
    )


def _plan(plan: worker_pb2.SlicePlan) -> SlicePlan:
    return SlicePlan(plan.train_tokens_per_slice, plan.threads, plan.dtype, plan.device)


def completion(request: worker_pb2.CompleteAttemptRequest) -> reports.Completion:
    """Raises InvalidArgument for an unknown outcome."""
    outcome = _OUTCOMES.get(request.outcome)
    if outcome is None:
        raise _invalid("outcome", "outcome is required.")
    final = request.final_adapter
    error = request.error
    return reports.Completion(
        attempt_id=request.attempt_id,
        lease_token=request.lease_token,
        outcome=outcome,
        final_adapter=AdapterObject(final.prefix, final.manifest_sha256) if final.prefix else None,
        trained_tokens=request.trained_tokens,
        error=JobError(error.code or "server_error", error.message, error.param)
        if request.HasField("error")
        else None,
        step=request.step,
        receipt=_receipt(request.receipt) if request.HasField("receipt") else None,
        comparison=_comparison(request.receipt.comparison)
        if request.receipt.HasField("comparison")
        else None,
    )


def _receipt(given: worker_pb2.EngineReceipt) -> EngineReceipt:
    return EngineReceipt(
        versions=dict(given.versions),
        flags=dict(given.flags),
        halvings=tuple(sorted((one.step, one.times) for one in given.halvings)),
        fused=given.fused,
        weights_sha256=given.weights_sha256,
    )


def _comparison(given: jobs_pb2.WeightComparison) -> WeightComparison:
    if not math.isfinite(given.largest_difference):
        return WeightComparison(not_compared_reason=f"{given.tensor} holds values that are no numbers")
    return WeightComparison(
        bit_identical=given.bit_identical,
        largest_difference=given.largest_difference,
        tensor=given.tensor,
        not_compared_reason=given.not_compared_reason,
    )


def attempt_pb(lease: workers.Lease) -> worker_pb2.Attempt:
    job = lease.job
    message = worker_pb2.Attempt(
        attempt_id=lease.attempt.id,
        lease_token=lease.attempt.lease_token,
        job=job.name,
        output_prefix=lease.attempt.prefix,
        earlier_prefixes=lease.earlier_prefixes,
        training=_tokens_pb(job.training_tokens),
        validation=_tokens_pb(job.validation_tokens),
        initial_adapter=_object_pb(job.initial_adapter),
        halvings=[worker_pb2.Halving(step=step, times=times) for step, times in job.halvings],
        compare_with=_object_pb(job.compare_with),
    )
    if job.slice_plan is not None:
        message.slice_plan.CopyFrom(worker_pb2.SlicePlan(**asdict(job.slice_plan)))
    if job.hyperparameters is not None:
        message.config.CopyFrom(trainingprotos.config_pb(job))
    return message


def _tokens_pb(tokens: TokenObject | None) -> worker_pb2.TokenObject | None:
    return worker_pb2.TokenObject(object_key=tokens.object_key, sha256=tokens.sha256) if tokens else None


def _object_pb(made: AdapterObject | None) -> models_pb2.AdapterObject | None:
    if made is None:
        return None
    return models_pb2.AdapterObject(prefix=made.prefix, manifest_sha256=made.manifest_sha256)
