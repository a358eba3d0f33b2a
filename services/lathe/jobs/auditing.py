"""The audits of a job's files, which datasets makes; a job waits for them and an estimate counts by them."""

from __future__ import annotations

from dataclasses import dataclass

from lathe.common.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from lathe.jobs import messages
from lathe.jobs.model import BaseRef, DatasetRef, JobError
from lathe.jobs.ports import Audit, AuditState, Datasets

# Answers that would be the same the next time.
FINAL = (NotFound, InvalidArgument, FailedPrecondition, DataLoss)


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a job, and what they are rendered for."""

    project: str
    base: BaseRef
    method: str
    training: DatasetRef
    validation: DatasetRef | None


async def audit_files(datasets: Datasets, files: Files) -> list[Audit] | JobError:
    """Of the training file and, if there is one, the validation file; any of them may be RUNNING still.

    A JobError for a file that cannot be used. Raises Unavailable and the like while datasets is away.
    """
    audits: list[Audit] = []
    validation = files.validation
    named = [("training_file", files.training), *([("validation_file", validation)] if validation else [])]
    for param, dataset in named:
        held_out = param == "validation_file"
        compared = validation.id if validation is not None and not held_out else ""
        try:
            audit = await datasets.ensure_audit(
                files.project,
                dataset.id,
                files.base.name,
                files.method,
                held_out=held_out,
                validation=compared,
            )
        except FINAL as error:
            return JobError(f"invalid_{param}", error.message, param)
        if audit.state is AuditState.ERROR:
            return messages.file_error(param, dataset.id, audit.findings, audit.finding_count)
        audits.append(audit)
    return audits


def are_ready(audits: list[Audit]) -> bool:
    return all(audit.state is AuditState.READY for audit in audits)
