"""datasets' messages: proto to model and back."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lathe.datasets.model import Audit, AuditOptions, AuditState, Dataset, DatasetState, Report
from lathe.v1 import datasets_pb2 as pb

_STATES = {
    DatasetState.UPLOADING: pb.DATASET_STATE_UPLOADING,
    DatasetState.VALIDATING: pb.DATASET_STATE_VALIDATING,
    DatasetState.READY: pb.DATASET_STATE_READY,
    DatasetState.ERROR: pb.DATASET_STATE_ERROR,
    DatasetState.DELETING: pb.DATASET_STATE_DELETING,
}
_AUDIT_STATES = {
    AuditState.RUNNING: pb.AUDIT_STATE_RUNNING,
    AuditState.READY: pb.AUDIT_STATE_READY,
    AuditState.ERROR: pb.AUDIT_STATE_ERROR,
    AuditState.FAILED: pb.AUDIT_STATE_ERROR,
}


def expire_time(message: pb.Dataset) -> datetime | None:
    return message.expire_time.ToDatetime(UTC) if message.HasField("expire_time") else None


def report_pb(report: Report) -> pb.ValidationReport:
    findings = [
        pb.Finding(line=item.line, field=item.field, code=item.code, message=item.message)
        for item in report.findings
    ]
    return pb.ValidationReport(
        example_count=report.example_count,
        finding_count=report.finding_count,
        findings=findings,
        format=report.format or "",
    )


def dataset_pb(dataset: Dataset) -> pb.Dataset:
    return pb.Dataset(
        name=dataset.name,
        display_name=dataset.display_name,
        purpose=dataset.purpose,
        state=_STATES[dataset.state],
        size_bytes=dataset.size_bytes,
        sha256=dataset.sha256,
        report=report_pb(dataset.report) if dataset.report is not None else None,
        create_time=_timestamp(dataset.create_time),
        expire_time=_timestamp(dataset.expire_time) if dataset.expire_time is not None else None,
    )


def upload_pb(dataset: Dataset) -> pb.Upload:
    uploading = dataset.state is DatasetState.UPLOADING
    return pb.Upload(
        name=dataset.name, state=_STATES[dataset.state], staging_key=dataset.staging_key if uploading else ""
    )


def audit_options(message: pb.AuditOptions) -> AuditOptions:
    return AuditOptions(message.method, message.context_limit, message.truncation)


def audit_pb(audit: Audit) -> pb.Audit:
    result = audit.result
    return pb.Audit(
        key=audit.key,
        state=_AUDIT_STATES[audit.state],
        report=report_pb(audit.report),
        object_key=audit.object_key,
        sha256=result.sha256,
        rows=result.rows,
        tokens=result.tokens,
        trained_tokens=result.trained_tokens,
        truncated_rows=result.truncated_rows,
        max_row_tokens=result.max_row_tokens,
    )


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message
