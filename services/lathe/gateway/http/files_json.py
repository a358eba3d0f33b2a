"""Files: datasets as OpenAI's JSON. Pure."""

from __future__ import annotations

from urllib.parse import quote

from lathe.common.names import last_id
from lathe.gateway.http.answers import Json, stamp
from lathe.gateway.http.conversion import CONVERSION_FIELDS
from lathe.v1 import datasets_pb2 as pb

RESULTS_PURPOSE = "fine-tune-results"

# gRPC's fields by OpenAI's names, for errors.
FIELDS = (
    ("dataset.display_name", "file"),
    ("dataset.purpose", "purpose"),
    ("dataset.expire_time", "expires_after.seconds"),
    ("page_size", "limit"),
    *CONVERSION_FIELDS,
)
_STATUS = {
    # Azure's word for an import that is under way; what is uploaded is no file before it is whole.
    pb.DATASET_STATE_UPLOADING: "pending",
    pb.DATASET_STATE_VALIDATING: "uploaded",
    pb.DATASET_STATE_READY: "processed",
    pb.DATASET_STATE_ERROR: "error",
    pb.DATASET_STATE_DELETING: "error",
}


def file_json(dataset: pb.Dataset) -> Json:
    """OpenAI's file object; `lathe` holds what OpenAI has no field for."""
    report = dataset.report if dataset.HasField("report") else None
    return {
        "id": last_id(dataset.name),
        "object": "file",
        "bytes": dataset.size_bytes,
        "created_at": stamp(dataset, "create_time") or 0,
        "expires_at": stamp(dataset, "expire_time"),
        "filename": dataset.display_name,
        "purpose": dataset.purpose,
        "status": _STATUS.get(dataset.state, "uploaded"),
        "status_details": status_details(report) if report is not None else None,
        "lathe": {
            "sha256": dataset.sha256 or None,
            "example_count": report.example_count if report is not None else None,
            "finding_count": report.finding_count if report is not None else None,
            "findings": [_group_json(group) for group in report.groups] if report is not None else None,
        },
    }


def status_details(report: pb.ValidationReport) -> str | None:
    """The findings in words, by line, and what to do about them; None when there are none."""
    if not report.findings:
        return None
    more = report.finding_count - len(report.findings)
    lines = [_finding(finding) for finding in report.findings]
    found = "; ".join(lines) + (f"; and {more} more." if more > 0 else ".")
    # What a message says itself is not said again.
    advice = dict.fromkeys(group.advice for group in report.groups if group.advice not in found)
    return " ".join([found, *advice])


def _group_json(group: pb.FindingGroup) -> Json:
    return {
        "code": group.code,
        "severity": pb.Severity.Name(group.severity).removeprefix("SEVERITY_").lower(),
        "count": group.count,
        "lines": list(group.first_lines),
        "message": group.message,
        "advice": group.advice,
    }


def _finding(finding: pb.Finding) -> str:
    message = finding.message.rstrip(".")
    if not finding.line:
        return message
    return f"line {finding.line}" + (f", {finding.field}" if finding.field else "") + f": {message}"


def disposition(filename: str) -> str:
    """content-disposition for any file name (RFC 6266)."""
    plain = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else "_" for c in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
