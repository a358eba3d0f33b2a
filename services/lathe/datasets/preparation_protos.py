"""The messages of preparation: proto to model and back."""

from __future__ import annotations

from lathe.common import names
from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.datasets.differences import Difference, Rows
from lathe.datasets.operations import (
    AuditChoice,
    Dedupe,
    Drop,
    Operation,
    Preparation,
    Sample,
    Split,
    Truncate,
)
from lathe.text.shortening import Policy
from lathe.v1 import datasets_pb2 as pb


def operation(message: pb.DatasetOperation) -> Operation:
    """Raises InvalidArgument if none is set."""
    match message.WhichOneof("operation"):
        case "split":
            split = message.split
            return Split(split.seed, split.fraction, split.count, split.stratify_by)
        case "dedupe":
            dedupe = message.dedupe
            return Dedupe(_audit("dedupe", dedupe.base_model, dedupe.options) if dedupe.near else None)
        case "drop":
            drop = message.drop
            audit = _audit("drop", drop.base_model, drop.options) if drop.codes else None
            return Drop(tuple(sorted(set(drop.lines))), tuple(sorted(set(drop.codes))), audit)
        case "sample":
            return Sample(message.sample.seed, message.sample.count)
        case "truncate":
            truncate = message.truncate
            audit = _audit("truncate", truncate.base_model, truncate.options)
            return Truncate(audit, truncate.policy or Policy.DROP_OLDEST, truncate.keep_unfit)
        case _:
            said = "operation must be one of split, dedupe, drop, sample and truncate."
            raise InvalidArgument(said, violations=[FieldViolation("operation", said)])


def preparation_pb(project: str, made: Preparation) -> pb.DatasetPreparation:
    parents = [
        pb.DatasetParent(name=names.DATASET.format(project, parent.id), sha256=parent.sha256)
        for parent in made.parents
    ]
    return pb.DatasetPreparation(parents=parents, operation=operation_pb(made.operation), part=made.part)


def operation_pb(made: Operation) -> pb.DatasetOperation:
    match made:
        case Split(seed, fraction, count, stratify_by):
            split = pb.SplitRows(seed=seed, fraction=fraction, count=count, stratify_by=stratify_by)
            return pb.DatasetOperation(split=split)
        case Dedupe(audit):
            base_model, options = _audit_pb(audit)
            dedupe = pb.DedupeRows(near=audit is not None, base_model=base_model, options=options)
            return pb.DatasetOperation(dedupe=dedupe)
        case Drop(lines, codes, audit):
            base_model, options = _audit_pb(audit)
            drop = pb.DropRows(lines=lines, codes=codes, base_model=base_model, options=options)
            return pb.DatasetOperation(drop=drop)
        case Sample(seed, count):
            return pb.DatasetOperation(sample=pb.SampleRows(seed=seed, count=count))
        case Truncate(audit, policy, keep_unfit):
            base_model, options = _audit_pb(audit)
            truncate = pb.TruncateRows(
                base_model=base_model, options=options, policy=policy, keep_unfit=keep_unfit
            )
            return pb.DatasetOperation(truncate=truncate)


def _audit(operation: str, base_model: str, options: pb.AuditOptions) -> AuditChoice:
    names.BASE_MODEL.parse(base_model, field=f"operation.{operation}.base_model")
    return AuditChoice(base_model, options.method, options.context_limit, options.truncation)


def _audit_pb(audit: AuditChoice | None) -> tuple[str, pb.AuditOptions | None]:
    if audit is None:
        return "", None
    options = pb.AuditOptions(
        method=audit.method, context_limit=audit.context_limit, truncation=audit.truncation
    )
    return audit.base_model, options


def difference_pb(found: Difference) -> pb.DatasetDiff:
    return pb.DatasetDiff(
        only_in_first=_rows_pb(found.only_in_first),
        only_in_second=_rows_pb(found.only_in_second),
        in_both=_rows_pb(found.in_both),
        moved=_rows_pb(found.moved),
    )


def _rows_pb(rows: Rows) -> pb.DiffRows:
    first = [pb.DiffRow(line=line, other_line=other) for line, other in rows.first]
    return pb.DiffRows(count=rows.count, first=first)
