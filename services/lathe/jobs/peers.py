"""The other services over gRPC: adapters behind ports.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from lathe.common import names
from lathe.common.errors import Internal
from lathe.common.rpc.channel import call
from lathe.common.rpc.principal import Principal
from lathe.jobs.model import AdapterObject, BaseRef, Job, TokenObject
from lathe.jobs.ports import (
    AdapterRegistration,
    Audit,
    AuditState,
    DatasetInfo,
    DatasetState,
    FileFinding,
    FileWarning,
    Quota,
    ResolvedModel,
    User,
)
from lathe.jobs.training import TrainingSpec
from lathe.v1 import accounts_pb2, datasets_pb2, models_pb2

if TYPE_CHECKING:
    # The generated code has these names for type checkers only.
    from lathe.v1.accounts_pb2_grpc import AccountsInternalServiceAsyncStub
    from lathe.v1.datasets_pb2_grpc import DatasetsInternalServiceAsyncStub, DatasetsServiceAsyncStub
    from lathe.v1.models_pb2_grpc import ModelsInternalServiceAsyncStub

_DATASET_STATES: dict[int, DatasetState] = {
    datasets_pb2.DATASET_STATE_UPLOADING: DatasetState.UPLOADING,
    datasets_pb2.DATASET_STATE_VALIDATING: DatasetState.VALIDATING,
    datasets_pb2.DATASET_STATE_READY: DatasetState.READY,
    datasets_pb2.DATASET_STATE_ERROR: DatasetState.ERROR,
    datasets_pb2.DATASET_STATE_DELETING: DatasetState.DELETING,
}
_AUDIT_STATES: dict[int, AuditState] = {
    datasets_pb2.AUDIT_STATE_RUNNING: AuditState.RUNNING,
    datasets_pb2.AUDIT_STATE_READY: AuditState.READY,
    datasets_pb2.AUDIT_STATE_ERROR: AuditState.ERROR,
}
# What many files take longer than that for goes on at the next try.
_SWEEP_TIMEOUT_S = 60.0
T = TypeVar("T")


class RpcDatasets:
    """Implements ports.Datasets."""

    def __init__(self, public: DatasetsServiceAsyncStub, internal: DatasetsInternalServiceAsyncStub) -> None:
        self._public = public
        self._internal = internal

    async def get(self, project: str, dataset: str, user: User) -> DatasetInfo:
        found = await call(
            self._public.GetDataset,
            datasets_pb2.GetDatasetRequest(name=names.DATASET.format(project, dataset)),
            principal=Principal(user.project, user.role, user.key_id),
        )
        return DatasetInfo(
            id=dataset,
            purpose=found.purpose,
            state=_known(_DATASET_STATES, found.state, "dataset state"),
            sha256=found.sha256,
            findings=_findings(found.report),
            finding_count=_error_count(found.report),
            format=found.report.format,
        )

    async def ensure_audit(
        self,
        project: str,
        dataset: str,
        base_model: str,
        method: str,
        *,
        held_out: bool,
        validation: str = "",
    ) -> Audit:
        found = await call(
            self._internal.EnsureAudit,
            datasets_pb2.EnsureAuditRequest(
                dataset=names.DATASET.format(project, dataset),
                base_model=base_model,
                options=datasets_pb2.AuditOptions(method=method),
                held_out=held_out,
                validation_dataset=names.DATASET.format(project, validation) if validation else "",
            ),
        )
        return Audit(
            key=found.key,
            state=_known(_AUDIT_STATES, found.state, "audit state"),
            tokens=TokenObject(found.object_key, found.sha256) if found.object_key else None,
            rows=found.rows,
            input_tokens=found.tokens,
            trained_tokens=found.trained_tokens,
            max_row_tokens=found.max_row_tokens,
            warnings=_warnings(found.report),
            findings=_findings(found.report),
            finding_count=_error_count(found.report),
        )

    async def keep_tokens(self, digests: Sequence[str]) -> None:
        await call(self._internal.KeepTokens, datasets_pb2.KeepTokensRequest(sha256=digests))

    async def create_result_file(
        self, project: str, display_name: str, content: bytes, request_id: str
    ) -> str:
        made = await call(
            self._internal.CreateResultFile,
            datasets_pb2.CreateResultFileRequest(
                parent=names.PROJECT.format(project),
                display_name=display_name,
                content=content,
                request_id=request_id,
            ),
        )
        return names.last_id(made.name)


class RpcModels:
    """Implements ports.Models."""

    def __init__(self, internal: ModelsInternalServiceAsyncStub) -> None:
        self._internal = internal

    async def resolve(self, project: str, model_id: str) -> ResolvedModel:
        found = await call(
            self._internal.ResolveModel,
            models_pb2.ResolveModelRequest(project=names.PROJECT.format(project), model_id=model_id),
        )
        base = found.base_model
        ready = base.state == models_pb2.BASE_MODEL_STATE_READY
        adapter = found.adapter if found.HasField("adapter") else None
        return ResolvedModel(
            base=BaseRef(
                names.last_id(base.name), base.digest, base.parameter_count, tuple(base.target_modules)
            ),
            tunable=base.tunable and ready,
            not_tunable_reason=base.not_tunable_reason if ready else "its import is not complete",
            methods=tuple(base.methods),
            adapter=AdapterObject(adapter.object.prefix, adapter.object.manifest_sha256) if adapter else None,
            lora=_lora(adapter.lineage.hyperparameters_json) if adapter else None,
            model_id=adapter.model_id if adapter else "",
            chats=bool(base.chat_template),
        )

    async def register_adapter(self, adapter: AdapterRegistration) -> None:
        lineage = models_pb2.Lineage(
            job=adapter.job,
            attempt=adapter.attempt,
            step=adapter.step,
            dataset_sha256=adapter.dataset.sha256,
            audit_key=adapter.audit_key,
            base_digest=adapter.base.digest,
            hyperparameters_json=adapter.hyperparameters_json,
            seed=adapter.seed,
            code_version=adapter.code_version,
            method=adapter.method,
            parent_model_id=adapter.parent_model_id,
            parent_manifest_sha256=adapter.parent_manifest_sha256,
        )
        request = models_pb2.RegisterAdapterRequest(
            parent=names.PROJECT.format(adapter.project),
            adapter=models_pb2.Adapter(
                model_id=adapter.model_id,
                base_model=adapter.base.name,
                object=models_pb2.AdapterObject(
                    prefix=adapter.object.prefix, manifest_sha256=adapter.object.manifest_sha256
                ),
                lineage=lineage,
                is_final=adapter.is_final,
            ),
        )
        await call(self._internal.RegisterAdapter, request)

    async def sweep_files(self, job: Job, kept: Sequence[str]) -> None:
        request = models_pb2.SweepJobFilesRequest(job=job.name, kept_prefixes=kept)
        await call(self._internal.SweepJobFiles, request, timeout=_SWEEP_TIMEOUT_S)


class RpcAccounts:
    """Implements ports.Accounts."""

    def __init__(self, internal: AccountsInternalServiceAsyncStub) -> None:
        self._internal = internal

    async def get_quota(self, project: str) -> Quota:
        found = await call(
            self._internal.GetQuota,
            accounts_pb2.GetQuotaRequest(project=names.PROJECT.format(project)),
            timeout=5.0,
        )
        return Quota(found.max_running_jobs, found.max_queued_jobs)


def _findings(report: datasets_pb2.ValidationReport) -> tuple[FileFinding, ...]:
    """The errors among them; what names no severity comes from a version that reported nothing else."""
    errors = (datasets_pb2.SEVERITY_ERROR, datasets_pb2.SEVERITY_UNSPECIFIED)
    return tuple(
        FileFinding(f.line, f.field, f.code, f.message) for f in report.findings if f.severity in errors
    )


def _error_count(report: datasets_pb2.ValidationReport) -> int:
    if not report.groups:
        return report.finding_count
    return sum(group.count for group in report.groups if group.severity == datasets_pb2.SEVERITY_ERROR)


def _warnings(report: datasets_pb2.ValidationReport) -> tuple[FileWarning, ...]:
    return tuple(
        FileWarning(group.code, group.count, tuple(group.first_lines), group.message, group.advice)
        for group in report.groups
        if group.severity == datasets_pb2.SEVERITY_WARNING
    )


def _known(table: Mapping[int, T], number: int, what: str) -> T:
    if number not in table:
        raise Internal(f"A peer answered with the unknown {what} {number}.")
    return table[number]


def _lora(hyperparameters_json: str) -> TrainingSpec | None:
    """The LoRA shape in an adapter's lineage; None if it has none."""
    try:
        values = json.loads(hyperparameters_json or "{}")
        return TrainingSpec(
            lora_r=int(values["lora_r"]),
            lora_alpha=float(values["lora_alpha"]),
            target_modules=tuple(values["target_modules"]),
            lora_dropout=float(values.get("lora_dropout", 0.0)),
            use_rslora=bool(values.get("use_rslora", False)),
            use_dora=bool(values.get("use_dora", False)),
            full_parameter=bool(values.get("full_parameter", False)),
        )
    except (ValueError, KeyError, TypeError):
        return None
