"""From the rows of the database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lathe.datasets.model import (
    Audit,
    AuditOptions,
    AuditResult,
    AuditState,
    AuditTask,
    Dataset,
    DatasetState,
    Distribution,
    ImportOptions,
    Overlap,
    Report,
    Share,
    Statistics,
    TokenizerFile,
)
from lathe.datasets.operations import from_json
from lathe.text.filekinds import FileType
from lathe.text.findings import Finding, FindingGroup, tally_of
from lathe.text.formats import Layout, RowFormat

PLAIN = (
    "id", "project", "display_name", "purpose", "create_time", "expire_time", "size_bytes", "sha256", "staging_key",
    "source",
)  # fmt: skip


def _report(content: Mapping[str, Any]) -> Report:
    findings = tuple(Finding(**finding) for finding in content["findings"])
    # Rows that an earlier version wrote have neither a format nor groups.
    found = content.get("format")
    groups = content.get("groups")
    statistics = content.get("statistics")
    layout = content.get("layout")
    return Report(
        content["example_count"],
        content["finding_count"],
        findings,
        RowFormat(found) if found else None,
        tally_of(findings).groups()
        if groups is None
        else tuple(FindingGroup(item["code"], item["count"], tuple(item["lines"])) for item in groups),
        None if statistics is None else _statistics(statistics),
        Layout(layout) if layout else None,
    )


def _statistics(content: Mapping[str, Any]) -> Statistics:
    """Distributions are objects, shares lists of objects."""
    values: dict[str, Any] = {
        name: Distribution(**value)
        if isinstance(value, Mapping)
        else tuple(Share(**share) for share in value)
        for name, value in content.items()
    }
    return Statistics(**values)


def dataset(row: Any) -> Dataset:
    report = _report(row.report) if row.report is not None else None
    plain = {name: getattr(row, name) for name in PLAIN}
    return Dataset(
        **plain,
        state=DatasetState(row.state),
        report=report,
        preparation=from_json(row.preparation) if row.preparation is not None else None,
        frozen_as=row.frozen_as or "",
        import_options=_import_options(row.import_options) if row.import_options is not None else None,
        source_sha256=row.source_sha256,
        source_size_bytes=row.source_size_bytes,
    )


def _import_options(content: Mapping[str, Any]) -> ImportOptions:
    return ImportOptions(FileType(content["file_type"]), content["columns"])


def overlap(row: Any) -> Overlap:
    return Overlap(row.frozen_sha256, row.dataset_sha256, row.count, tuple(row.lines))


def audit(row: Any) -> Audit:
    result = AuditResult(
        row.sha256,
        row.rows,
        row.tokens,
        row.trained_tokens,
        row.truncated_rows,
        row.max_row_tokens,
        row.findings_sha256,
    )
    # While RUNNING the digests only reserve the blobs.
    state = AuditState(row.state)
    settled = state in (AuditState.READY, AuditState.ERROR)
    return Audit(row.key, state, _report(row.report), result if settled else AuditResult())


def task(row: Any) -> AuditTask:
    return AuditTask(
        key=row.key,
        dataset_sha256=row.dataset_sha256,
        base_model=row.base_model,
        tokenizer_digest=row.tokenizer_digest,
        template_digest=row.template_digest,
        options=AuditOptions(**row.options),
        files=tuple(TokenizerFile(**file) for file in row.files),
        now=row.create_time,
        compared=(row.compared[0], row.compared[1]) if row.compared else None,
    )
