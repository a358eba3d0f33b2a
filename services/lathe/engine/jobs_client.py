"""jobs over gRPC: model to proto and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import grpc

from lathe.common.errors import Unavailable, Unimplemented
from lathe.common.rpc.channel import call
from lathe.common.trainingconfig import CONFIG_VERSION
from lathe.engine.model import (
    Action,
    AdapterRef,
    Attempt,
    AttemptError,
    CheckpointReport,
    Dpo,
    EngineReceipt,
    HeartbeatReply,
    HeldLease,
    Kto,
    Method,
    Note,
    Orpo,
    Outcome,
    Progress,
    Registration,
    SlicePlan,
    StepMetrics,
    Supervised,
    Terms,
    TokenRef,
    TrainingConfig,
)
from lathe.v1 import jobs_pb2, models_pb2, worker_pb2, worker_pb2_grpc

_ACTIONS = {
    worker_pb2.DIRECTIVE_ACTION_CANCEL: Action.CANCEL,
    worker_pb2.DIRECTIVE_ACTION_PAUSE: Action.PAUSE,
    worker_pb2.DIRECTIVE_ACTION_PREEMPT: Action.PREEMPT,
    worker_pb2.DIRECTIVE_ACTION_LEASE_LOST: Action.LEASE_LOST,
}
_OUTCOMES = {
    Outcome.SUCCEEDED: worker_pb2.ATTEMPT_OUTCOME_SUCCEEDED,
    Outcome.FAILED: worker_pb2.ATTEMPT_OUTCOME_FAILED,
    Outcome.RELEASED: worker_pb2.ATTEMPT_OUTCOME_RELEASED,
    Outcome.CANCELLED: worker_pb2.ATTEMPT_OUTCOME_CANCELLED,
    Outcome.RETRYABLE: worker_pb2.ATTEMPT_OUTCOME_RETRYABLE,
    Outcome.WORKER_LOST: worker_pb2.ATTEMPT_OUTCOME_WORKER_LOST,
}
_SCHEDULES: dict[str, Literal["cosine", "linear", "constant"]] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
}
# A heartbeat that takes longer than this has missed its purpose.
HEARTBEAT_TIMEOUT_S = 3.0
DEFAULT_HEARTBEAT_S = 3.0
DEFAULT_LEASE_TERM_S = 15.0


class GrpcJobs:
    """The `Jobs` port over a channel of `common.rpc.channel.connect`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = worker_pb2_grpc.WorkerServiceStub(channel)

    async def register(self, registration: Registration) -> Terms:
        request = worker_pb2.RegisterRequest(
            engine_id=registration.engine_id,
            base_model=registration.base_model,
            base_digest=registration.base_digest,
            address=registration.address,
            capacity=worker_pb2.Capacity(
                max_attempts=registration.max_attempts,
                max_sequences=registration.max_sequences,
                device=registration.device,
                threads=registration.threads,
            ),
            code_version=registration.code_version,
            engine_class=registration.engine_class,
            job_id=registration.job_id,
        )
        answer = await call(self._stub.Register, request)
        return Terms(
            answer.heartbeat_interval.ToNanoseconds() / 1e9 or DEFAULT_HEARTBEAT_S,
            answer.lease_term.ToNanoseconds() / 1e9 or DEFAULT_LEASE_TERM_S,
        )

    async def heartbeat(
        self,
        engine_id: str,
        leases: Sequence[HeldLease],
        *,
        active_sequences: int,
        memory_bytes: int,
        draining: bool,
    ) -> HeartbeatReply:
        request = worker_pb2.HeartbeatRequest(
            engine_id=engine_id,
            leases=[
                worker_pb2.HeldLease(attempt_id=lease.attempt_id, lease_token=lease.lease_token)
                for lease in leases
            ],
            active_sequences=active_sequences,
            memory_bytes=memory_bytes,
            draining=draining,
            config_version=CONFIG_VERSION,
        )
        answer = await call(self._stub.Heartbeat, request, timeout=HEARTBEAT_TIMEOUT_S)
        directives = tuple(
            (item.attempt_id, _ACTIONS[item.action]) for item in answer.directives if item.action in _ACTIONS
        )
        return HeartbeatReply(directives, answer.reregister, answer.shut_down)

    async def lease(self, engine_id: str) -> Attempt | None:
        request = worker_pb2.LeaseAttemptRequest(engine_id=engine_id, config_version=CONFIG_VERSION)
        answer = await call(self._stub.LeaseAttempt, request)
        if not answer.HasField("attempt"):
            return None
        try:
            return attempt_from(answer.attempt)
        except Unimplemented as error:
            # It would be the same the next time: the job's user should know, and nobody wait for the lease to run out.
            lease = HeldLease(answer.attempt.attempt_id, answer.attempt.lease_token)
            why = AttemptError(error.reason.lower(), error.message)
            await self.complete(lease, Outcome.FAILED, step=0, trained_tokens=0, error=why)
            return None

    async def report(self, lease: HeldLease, progress: Progress) -> None:
        plan = progress.slice_plan
        request = worker_pb2.ReportProgressRequest(
            attempt_id=lease.attempt_id,
            lease_token=lease.lease_token,
            metrics=[metrics_pb(row) for row in progress.metrics],
            checkpoints=[_checkpoint_pb(item) for item in progress.checkpoints],
            slice_plan=_plan_pb(plan) if plan is not None else None,
            total_steps=progress.total_steps,
            notes=[_note_pb(note) for note in progress.notes],
            dropped_checkpoints=progress.dropped_checkpoints,
        )
        await call(self._stub.ReportProgress, request)

    async def complete(
        self,
        lease: HeldLease,
        outcome: Outcome,
        *,
        step: int,
        trained_tokens: int,
        final_adapter: AdapterRef | None = None,
        error: AttemptError | None = None,
        receipt: EngineReceipt | None = None,
    ) -> None:
        request = worker_pb2.CompleteAttemptRequest(
            attempt_id=lease.attempt_id,
            lease_token=lease.lease_token,
            outcome=_OUTCOMES[outcome],
            step=step,
            trained_tokens=trained_tokens,
            final_adapter=_adapter_pb(final_adapter) if final_adapter is not None else None,
            error=jobs_pb2.JobError(code=error.code, message=error.message) if error is not None else None,
            receipt=receipt_pb(receipt) if receipt is not None else None,
        )
        await call(self._stub.CompleteAttempt, request)

    async def deregister(self, engine_id: str) -> None:
        await call(self._stub.Deregister, worker_pb2.DeregisterRequest(engine_id=engine_id), timeout=3.0)


def metrics_pb(row: StepMetrics) -> jobs_pb2.StepMetrics:
    """The fields have the same names on both sides."""
    return jobs_pb2.StepMetrics(
        step=row.step,
        total_steps=row.total_steps,
        train_loss=row.train_loss,
        train_mean_token_accuracy=row.train_mean_token_accuracy,
        learning_rate=row.learning_rate,
        tokens_per_second=row.tokens_per_second,
        trained_tokens=row.trained_tokens,
        valid_loss=row.valid_loss,
        valid_mean_token_accuracy=row.valid_mean_token_accuracy,
        full_valid_loss=row.full_valid_loss,
        full_valid_mean_token_accuracy=row.full_valid_mean_token_accuracy,
        step_seconds=row.step_seconds,
        grad_norm=row.grad_norm,
        epoch=row.epoch,
        figures=row.figures,
    )


def _note_pb(note: Note) -> worker_pb2.ProgressNote:
    return worker_pb2.ProgressNote(step=note.step, kind=note.kind, message=note.message, data=note.data)


def receipt_pb(receipt: EngineReceipt) -> worker_pb2.EngineReceipt:
    """Steps are counted from 1 there."""
    compared = receipt.comparison
    return worker_pb2.EngineReceipt(
        versions=receipt.environment.versions,
        flags=receipt.environment.flags,
        halvings=[worker_pb2.Halving(step=index + 1, times=times) for index, times in receipt.halvings],
        fused=receipt.fused,
        weights_sha256=receipt.weights_sha256,
        comparison=jobs_pb2.WeightComparison(
            bit_identical=compared.bit_identical,
            largest_difference=compared.largest_difference,
            tensor=compared.tensor,
            not_compared_reason=compared.not_compared_reason,
        )
        if compared is not None
        else None,
    )


def config_from(config: worker_pb2.TrainingConfig) -> TrainingConfig:
    """Resolved hyperparameters; what a jobs of before there were methods leaves out is as it was then.

    Raises Unimplemented.
    """
    schedule = _SCHEDULES.get(config.schedule or "cosine")
    if schedule is None:
        raise Unimplemented(
            f"This engine does not know the schedule {config.schedule!r}.", reason="UNKNOWN_SCHEDULE"
        )
    return TrainingConfig(
        n_epochs=config.n_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=tuple(config.target_modules),
        base_model=config.base_model,
        method=_method_from(config),
        schedule=schedule,
        eval_every=config.eval_every,
        early_stopping_patience=config.early_stopping_patience,
        keep_checkpoints=config.keep_checkpoints,
        sample_prompts=config.sample_prompts,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=config.lora_dropout,
        full_parameter=config.full_parameter,
    )


def _method_from(config: worker_pb2.TrainingConfig) -> Method:
    match config.method:
        case "" | "supervised":
            return Supervised()
        case "dpo":
            return Dpo(config.beta, config.loss_type, config.label_smoothing)
        case "orpo":
            return Orpo(config.beta)
        case "kto":
            return Kto(config.beta, config.desirable_weight, config.undesirable_weight)
        case _:
            raise Unimplemented(f"This engine does not train by {config.method!r}.", reason="UNKNOWN_METHOD")


def attempt_from(pb: worker_pb2.Attempt) -> Attempt:
    """A lease.

    Raises Unavailable for one that names no training object (jobs is not done with it), Unimplemented for a method or a
    schedule that this engine does not know.
    """
    if not pb.training.object_key:
        raise Unavailable(f"Attempt {pb.attempt_id} names no training object.")
    plan = pb.slice_plan
    initial, compared = pb.initial_adapter, pb.compare_with
    return Attempt(
        attempt_id=pb.attempt_id,
        lease_token=pb.lease_token,
        job=pb.job,
        output_prefix=pb.output_prefix,
        training=TokenRef(pb.training.object_key, pb.training.sha256),
        validation=TokenRef(pb.validation.object_key, pb.validation.sha256)
        if pb.validation.object_key
        else None,
        config=config_from(pb.config),
        slice_plan=SlicePlan(plan.train_tokens_per_slice, plan.threads, plan.dtype, plan.device)
        if plan.train_tokens_per_slice
        else None,
        earlier_prefixes=tuple(pb.earlier_prefixes),
        initial_adapter=AdapterRef(initial.prefix, initial.manifest_sha256) if initial.prefix else None,
        halvings=tuple((item.step - 1, item.times) for item in pb.halvings),
        compare_with=AdapterRef(compared.prefix, compared.manifest_sha256) if compared.prefix else None,
    )


def _plan_pb(plan: SlicePlan) -> worker_pb2.SlicePlan:
    return worker_pb2.SlicePlan(
        train_tokens_per_slice=plan.train_tokens_per_slice,
        threads=plan.threads,
        dtype=plan.dtype,
        device=plan.device,
    )


def _adapter_pb(ref: AdapterRef) -> models_pb2.AdapterObject:
    return models_pb2.AdapterObject(prefix=ref.prefix, manifest_sha256=ref.manifest_sha256)


def _checkpoint_pb(item: CheckpointReport) -> worker_pb2.CheckpointReport:
    return worker_pb2.CheckpointReport(
        step=item.step,
        object=_adapter_pb(item.ref),
        metrics=metrics_pb(item.metrics) if item.metrics is not None else None,
    )
