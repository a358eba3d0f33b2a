"""datasets' messages: proto to model and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lathe.datasets.model import (
    Audit,
    AuditOptions,
    AuditState,
    Dataset,
    DatasetState,
    Distribution,
    ImportOptions,
    Report,
    Share,
    Statistics,
    invalid,
)
from lathe.datasets.preparation import Found, Prepared
from lathe.datasets.preparation_protos import preparation_pb
from lathe.datasets.preview import SequencePreview
from lathe.datasets.upload_service import PartTarget, SignedParts
from lathe.datasets.uploads import UploadSession, UploadState
from lathe.text.filekinds import FileType, file_type_of
from lathe.text.findings import Finding, FindingGroup, Severity, kind_of
from lathe.text.rowindex import DIGEST_BYTES
from lathe.v1 import datasets_pb2 as pb

# Below gRPC's 4 MiB; one dataset is far below the rest.
_PAGE_BYTES = 3 << 20
_STATES = {
    DatasetState.UPLOADING: pb.DATASET_STATE_UPLOADING,
    DatasetState.VALIDATING: pb.DATASET_STATE_VALIDATING,
    DatasetState.READY: pb.DATASET_STATE_READY,
    DatasetState.ERROR: pb.DATASET_STATE_ERROR,
    DatasetState.DELETING: pb.DATASET_STATE_DELETING,
}
_UPLOAD_STATES = {
    UploadState.PENDING: pb.UPLOAD_SESSION_STATE_PENDING,
    UploadState.COMPLETED: pb.UPLOAD_SESSION_STATE_COMPLETED,
    UploadState.CANCELLED: pb.UPLOAD_SESSION_STATE_CANCELLED,
    UploadState.EXPIRED: pb.UPLOAD_SESSION_STATE_EXPIRED,
}
_AUDIT_STATES = {
    AuditState.RUNNING: pb.AUDIT_STATE_RUNNING,
    AuditState.READY: pb.AUDIT_STATE_READY,
    AuditState.ERROR: pb.AUDIT_STATE_ERROR,
    AuditState.FAILED: pb.AUDIT_STATE_ERROR,
}


_SEVERITIES = {
    Severity.ERROR: pb.SEVERITY_ERROR,
    Severity.WARNING: pb.SEVERITY_WARNING,
    Severity.NOTE: pb.SEVERITY_NOTE,
}


def expire_time(message: pb.Dataset) -> datetime | None:
    return message.expire_time.ToDatetime(UTC) if message.HasField("expire_time") else None


def import_options(message: pb.Dataset, name: str = "") -> ImportOptions | None:
    """name: what the file is called where it comes from; its ending counts if that of its own does not say what it is.
    Raises InvalidArgument for a type that there is not."""
    if not message.HasField("import_options"):
        return None
    given = message.import_options
    try:
        file_type = FileType(given.file_type or file_type_of(message.display_name, name))
    except ValueError:
        known = ", ".join(FileType)
        raise invalid(
            "dataset.import_options.file_type",
            f"dataset.import_options.file_type {given.file_type[:40]!r} must be one of {known}.",
        ) from None
    return ImportOptions(file_type, dict(given.columns))


def _import_options_pb(options: ImportOptions | None) -> pb.ImportOptions | None:
    if options is None:
        return None
    return pb.ImportOptions(file_type=options.file_type.value, columns=options.columns)


def report_pb(report: Report) -> pb.ValidationReport:
    return pb.ValidationReport(
        example_count=report.example_count,
        finding_count=report.finding_count,
        findings=[_finding_pb(finding) for finding in report.findings],
        format=report.format or "",
        layout=report.layout or "",
        groups=[_group_pb(group) for group in report.groups],
        statistics=_statistics_pb(report.statistics) if report.statistics is not None else None,
    )


def _finding_pb(finding: Finding) -> pb.Finding:
    kind = kind_of(finding.code)
    return pb.Finding(
        line=finding.line,
        field=finding.field,
        code=finding.code,
        message=finding.message,
        severity=_SEVERITIES[kind.severity],
        advice=kind.advice,
    )


def _group_pb(group: FindingGroup) -> pb.FindingGroup:
    kind = kind_of(group.code)
    return pb.FindingGroup(
        code=group.code,
        severity=_SEVERITIES[kind.severity],
        count=group.count,
        first_lines=group.lines,
        message=kind.meaning,
        advice=kind.advice,
    )


def _statistics_pb(found: Statistics) -> pb.Statistics:
    return pb.Statistics(
        prompt_tokens=_distribution_pb(found.prompt_tokens),
        completion_tokens=_distribution_pb(found.completion_tokens),
        turn_tokens=_distribution_pb(found.turn_tokens),
        row_tokens=_distribution_pb(found.row_tokens),
        turns=_distribution_pb(found.turns),
        languages=[_share_pb(share) for share in found.languages],
        answers=[_share_pb(share) for share in found.answers],
    )


def _distribution_pb(found: Distribution) -> pb.Distribution:
    return pb.Distribution(**asdict(found))


def _share_pb(share: Share) -> pb.Share:
    return pb.Share(value=share.value, count=share.count)


def dataset_pb(dataset: Dataset) -> pb.Dataset:
    made = dataset.preparation
    return pb.Dataset(
        name=dataset.name,
        display_name=dataset.display_name,
        purpose=dataset.purpose,
        state=_STATES[dataset.state],
        size_bytes=dataset.size_bytes,
        sha256=dataset.sha256,
        import_options=_import_options_pb(dataset.import_options),
        source=dataset.source,
        source_sha256=dataset.source_sha256,
        source_size_bytes=dataset.source_size_bytes,
        report=report_pb(dataset.report) if dataset.report is not None else None,
        create_time=_timestamp(dataset.create_time),
        expire_time=_timestamp(dataset.expire_time) if dataset.expire_time is not None else None,
        preparation=preparation_pb(dataset.project, made) if made is not None else None,
        frozen_as=dataset.frozen_as,
    )


def upload_pb(dataset: Dataset, *, in_parts: bool) -> pb.Upload:
    uploading = dataset.state is DatasetState.UPLOADING
    return pb.Upload(
        name=dataset.name,
        state=_STATES[dataset.state],
        staging_key=dataset.staging_key if uploading else "",
        in_parts=in_parts,
    )


def session_pb(session: UploadSession, dataset: Dataset | None = None) -> pb.UploadSession:
    return pb.UploadSession(
        name=session.name,
        state=_UPLOAD_STATES[session.state],
        display_name=session.display_name,
        purpose=session.purpose,
        size_bytes=session.size_bytes,
        sha256=session.sha256,
        create_time=_timestamp(session.create_time),
        expire_time=_timestamp(session.expire_time),
        dataset=dataset_pb(dataset) if dataset is not None else None,
    )


def part_target_pb(target: PartTarget) -> pb.UploadPartTarget:
    return pb.UploadPartTarget(
        part_id=target.part_id, object_key=target.object_key, max_bytes=target.max_bytes
    )


def signed_pb(signed: SignedParts) -> pb.SignUploadPartsResponse:
    parts = [
        pb.SignedPart(number=part.number, offset=part.offset, size_bytes=part.size, url=url)
        for part, url in signed.parts
    ]
    return pb.SignUploadPartsResponse(
        parts=parts, expire_time=_timestamp(signed.expire_time), missing_bytes=signed.missing_bytes
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
        sha256=result.sha256 if audit.object_key else "",
        rows=result.rows,
        tokens=result.tokens,
        trained_tokens=result.trained_tokens,
        truncated_rows=result.truncated_rows,
        max_row_tokens=result.max_row_tokens,
        findings_object_key=audit.findings_key,
        findings_sha256=result.findings_sha256,
    )


def prepared_pb(made: Prepared) -> pb.PreparedDataset:
    dataset = dataset_pb(made.dataset) if made.dataset is not None else None
    return pb.PreparedDataset(
        part=made.part,
        rows=made.rows,
        dataset=dataset,
        shortened_rows=made.shortened,
        unfit_rows=made.unfit,
    )


def page_pb(datasets: Sequence[Dataset]) -> list[pb.Dataset]:
    """The first of them: as many as fit into one answer beside each other, and one at least."""
    page: list[pb.Dataset] = []
    room = _PAGE_BYTES
    for dataset in datasets:
        message = dataset_pb(dataset)
        room -= message.ByteSize()
        if page and room < 0:
            break
        page.append(message)
    return page


def _named_pb(dataset: Dataset) -> pb.Dataset:
    """Without its report, which is most of it: there may be thousands in one answer."""
    return dataset_pb(replace(dataset, report=None))


def found_pb(found: Found) -> pb.FindRowsResponse:
    places = [
        pb.RowPlaces(dataset=_named_pb(place.dataset), count=place.count, first_lines=place.first_lines)
        for place in found.places
    ]
    return pb.FindRowsResponse(digest=found.digest.hex(), row=found.row.decode(), places=places)


def trained_rows_pb(found: Sequence[Dataset], audit: Audit | None) -> pb.TrainedRows:
    answer = pb.TrainedRows(datasets=map(_named_pb, found))
    if audit is not None:
        answer.audit.CopyFrom(public_audit_pb(audit))
    return answer


def digest(text: str) -> bytes:
    """Raises InvalidArgument for what is no digest of a row."""
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != DIGEST_BYTES:
        raise invalid("digest", f"digest must be {2 * DIGEST_BYTES} hex digits.")
    return found


def public_audit_pb(audit: Audit) -> pb.Audit:
    """Without what only services read."""
    message = audit_pb(audit)
    for name in ("object_key", "sha256", "findings_object_key", "findings_sha256"):
        message.ClearField(name)
    return message


def preview_pb(audit: Audit, sequences: Sequence[SequencePreview]) -> pb.PreviewDatasetResponse:
    return pb.PreviewDatasetResponse(
        state=_AUDIT_STATES[audit.state],
        report=report_pb(audit.report),
        sequences=[
            pb.PreviewSequence(
                line=sequence.line,
                role=sequence.role.name.lower(),
                tokens=[
                    pb.PreviewToken(id=id_, text=text, trained=trained)
                    for id_, text, trained in sequence.tokens
                ],
                token_count=sequence.token_count,
                trained_token_count=sequence.trained_token_count,
            )
            for sequence in sequences
        ],
    )


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message
