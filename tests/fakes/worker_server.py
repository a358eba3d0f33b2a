"""The fake jobs behind a real port: WorkerService as an engine in another process meets it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import grpc

from lathe.common.errors import LatheError
from lathe.common.rpc.status import to_rpc_status
from lathe.engine.model import (
    Action,
    AdapterRef,
    Attempt,
    AttemptError,
    CheckpointReport,
    EngineReceipt,
    Environment,
    HeldLease,
    Note,
    Outcome,
    Progress,
    Registration,
    SlicePlan,
    StepMetrics,
    TrainingConfig,
    WeightComparison,
)
from lathe.v1 import jobs_pb2, models_pb2, worker_pb2, worker_pb2_grpc
from tests.fakes.worker_jobs import FakeJobs

_ACTIONS = {
    Action.CANCEL: worker_pb2.DIRECTIVE_ACTION_CANCEL,
    Action.PAUSE: worker_pb2.DIRECTIVE_ACTION_PAUSE,
    Action.PREEMPT: worker_pb2.DIRECTIVE_ACTION_PREEMPT,
    Action.LEASE_LOST: worker_pb2.DIRECTIVE_ACTION_LEASE_LOST,
}
_OPTIONAL = (
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, jobs: FakeJobs) -> None:
        self._jobs = jobs

    async def Register(self, request: worker_pb2.RegisterRequest, context: object) -> object:
        terms = await self._jobs.register(
            Registration(
                engine_id=request.engine_id,
                base_model=request.base_model,
                base_digest=request.base_digest,
                address=request.address,
                max_attempts=request.capacity.max_attempts,
                max_sequences=request.capacity.max_sequences,
                device=request.capacity.device,
                threads=request.capacity.threads,
                code_version=request.code_version,
            )
        )
        answer = worker_pb2.RegisterResponse()
        answer.heartbeat_interval.FromNanoseconds(round(terms.heartbeat_interval * 1e9))
        answer.lease_term.FromNanoseconds(round(terms.lease_term * 1e9))
        return answer

    async def Heartbeat(self, request: worker_pb2.HeartbeatRequest, context: object) -> object:
        reply = await self._jobs.heartbeat(
            request.engine_id,
            [HeldLease(item.attempt_id, item.lease_token) for item in request.leases],
            active_sequences=request.active_sequences,
            memory_bytes=request.memory_bytes,
            draining=request.draining,
        )
        return worker_pb2.HeartbeatResponse(
            directives=[
                worker_pb2.Directive(attempt_id=attempt, action=_ACTIONS[action])
                for attempt, action in reply.directives
            ],
            reregister=reply.reregister,
            shut_down=reply.shut_down,
        )

    async def LeaseAttempt(self, request: worker_pb2.LeaseAttemptRequest, context: object) -> object:
        attempt = await self._jobs.lease(request.engine_id)
        return worker_pb2.LeaseAttemptResponse(attempt=_attempt(attempt) if attempt is not None else None)

    async def ReportProgress(
        self, request: worker_pb2.ReportProgressRequest, context: grpc.aio.ServicerContext
    ) -> object:
        plan = request.slice_plan
        progress = Progress(
            tuple(_metrics(row) for row in request.metrics),
            tuple(
                CheckpointReport(item.step, _ref(item.object), _metrics(item.metrics))
                for item in request.checkpoints
            ),
            SlicePlan(plan.train_tokens_per_slice, plan.threads, plan.dtype, plan.device)
            if request.HasField("slice_plan")
            else None,
            request.total_steps,
            tuple(Note(note.step, note.kind, note.message, dict(note.data)) for note in request.notes),
            tuple(request.dropped_checkpoints),
        )
        try:
            await self._jobs.report(HeldLease(request.attempt_id, request.lease_token), progress)
        except LatheError as error:
            await context.abort(*to_rpc_status(error))
        return worker_pb2.ReportProgressResponse()

    async def CompleteAttempt(
        self, request: worker_pb2.CompleteAttemptRequest, context: grpc.aio.ServicerContext
    ) -> object:
        outcome = worker_pb2.AttemptOutcome.Name(request.outcome).removeprefix("ATTEMPT_OUTCOME_").lower()
        try:
            await self._jobs.complete(
                HeldLease(request.attempt_id, request.lease_token),
                Outcome(outcome),
                step=request.step,
                trained_tokens=request.trained_tokens,
                final_adapter=_ref(request.final_adapter) if request.HasField("final_adapter") else None,
                error=AttemptError(request.error.code, request.error.message)
                if request.HasField("error")
                else None,
                receipt=_receipt(request.receipt) if request.HasField("receipt") else None,
            )
        except LatheError as error:
            await context.abort(*to_rpc_status(error))
        return worker_pb2.CompleteAttemptResponse()

    async def Deregister(self, request: worker_pb2.DeregisterRequest, context: object) -> object:
        await self._jobs.deregister(request.engine_id)
        return worker_pb2.DeregisterResponse()


@asynccontextmanager
async def worker_server(jobs: FakeJobs) -> AsyncIterator[str]:
    """WorkerService on a free port; yields its address."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerServicer(jobs), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def _attempt(attempt: Attempt) -> worker_pb2.Attempt:
    plan, config = attempt.slice_plan, attempt.config
    return worker_pb2.Attempt(
        attempt_id=attempt.attempt_id,
        lease_token=attempt.lease_token,
        job=attempt.job,
        output_prefix=attempt.output_prefix,
        training=worker_pb2.TokenObject(
            object_key=attempt.training.object_key, sha256=attempt.training.sha256
        ),
        validation=worker_pb2.TokenObject(
            object_key=attempt.validation.object_key, sha256=attempt.validation.sha256
        )
        if attempt.validation is not None
        else None,
        config=_config(config),
        slice_plan=worker_pb2.SlicePlan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
        if plan is not None
        else None,
        earlier_prefixes=attempt.earlier_prefixes,
        halvings=[worker_pb2.Halving(step=index + 1, times=times) for index, times in attempt.halvings],
        compare_with=models_pb2.AdapterObject(
            prefix=attempt.compare_with.prefix, manifest_sha256=attempt.compare_with.manifest_sha256
        )
        if attempt.compare_with is not None
        else None,
    )


def _config(config: TrainingConfig) -> worker_pb2.TrainingConfig:
    """On the wire a method's own settings stand among the others."""
    flat = {name: getattr(config, name) for name in config.__dataclass_fields__}
    method = {"method": type(config.method).__name__.lower(), **asdict(config.method)}
    return worker_pb2.TrainingConfig(**flat | method)


def _receipt(pb: worker_pb2.EngineReceipt) -> EngineReceipt:
    compared = pb.comparison
    return EngineReceipt(
        Environment(dict(pb.versions), dict(pb.flags)),
        tuple((item.step - 1, item.times) for item in pb.halvings),
        pb.fused,
        pb.weights_sha256,
        WeightComparison(
            compared.bit_identical, compared.largest_difference, compared.tensor, compared.not_compared_reason
        )
        if pb.HasField("comparison")
        else None,
    )


def _ref(adapter: models_pb2.AdapterObject) -> AdapterRef:
    return AdapterRef(adapter.prefix, adapter.manifest_sha256)


def _metrics(row: jobs_pb2.StepMetrics) -> StepMetrics:
    values = {name: getattr(row, name) for name in StepMetrics.__dataclass_fields__}
    return StepMetrics(**values | {name: None for name in _OPTIONAL if not row.HasField(name)})
