"""The sentences users read: events as OpenAI words them, errors and reasons for waiting. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from lathe.jobs.model import EventLevel, EventType, JobError, NewEvent, StepMetrics, WeightComparison
from lathe.jobs.ports import FileFinding, FileWarning

VALIDATING = "The files are being validated for this model."
_LINES_SHOWN = 10
# The code of an error of the engine.
PARENT_DELETED = "parent_deleted"


def rerun_created(job_id: str, first: str) -> NewEvent:
    return NewEvent(f"Created fine-tuning job: {job_id}, a rerun of {first}")


def other_tokens(first: str) -> NewEvent:
    return NewEvent(
        f"The files render to other tokens than they did for {first}, so the weights will not be the same",
        level=EventLevel.WARN,
    )


def compared(first: str, comparison: WeightComparison) -> NewEvent:
    if comparison.not_compared_reason:
        why = comparison.not_compared_reason.rstrip(".")
        return NewEvent(f"The weights were not compared with those of {first}: {why}", level=EventLevel.WARN)
    if comparison.bit_identical:
        return NewEvent(f"The weights are bit-identical to those of {first}")
    return NewEvent(
        f"The weights differ from those of {first} by at most {comparison.largest_difference:.3g} "
        f"(in {comparison.tensor})",
        level=EventLevel.WARN,
    )


def created(job_id: str) -> NewEvent:
    return NewEvent(f"Created fine-tuning job: {job_id}")


def validating(training: str, validation: str | None) -> NewEvent:
    tail = f" and validation file: {validation}" if validation else ""
    return NewEvent(f"Validating training file: {training}{tail}")


def validated() -> NewEvent:
    return NewEvent("Files validated, moving job to queued state")


def started() -> NewEvent:
    return NewEvent("Fine-tuning job started")


def step(metrics: StepMetrics) -> NewEvent:
    parts = [f"Step {metrics.step}/{metrics.total_steps}: training loss={metrics.train_loss:.2f}"]
    if metrics.valid_loss is not None:
        parts.append(f"validation loss={metrics.valid_loss:.2f}")
    if metrics.full_valid_loss is not None:
        parts.append(f"full validation loss={metrics.full_valid_loss:.2f}")
    return NewEvent(", ".join(parts), type=EventType.METRICS, step=metrics.step)


def checkpoint_created(at_step: int) -> NewEvent:
    return NewEvent(f"Checkpoint created at step {at_step}", step=at_step)


def model_created(model_id: str) -> NewEvent:
    return NewEvent(f"New fine-tuned model created: {model_id}")


def succeeded() -> NewEvent:
    return NewEvent("The job has successfully completed")


def cancelled() -> NewEvent:
    return NewEvent("The job has been cancelled")


def failed(error: JobError) -> NewEvent:
    return NewEvent(f"The job failed: {error.message}", level=EventLevel.ERROR)


def attempt_lost(number: int, why: str) -> NewEvent:
    return NewEvent(
        f"Attempt {number} was interrupted ({why}); the job goes on from its newest checkpoint",
        level=EventLevel.WARN,
    )


def file_warning(file: str, warning: FileWarning) -> NewEvent:
    """One kind of warning about a file, with the lines that have it."""
    return NewEvent(
        f"The {file}, {_lines(warning)}: {warning.message}. {warning.advice}", level=EventLevel.WARN
    )


def _lines(warning: FileWarning) -> str:
    """`lines 3, 7, 9 and 40 more`"""
    if 0 in warning.lines:
        return "as a whole"
    shown = warning.lines[:_LINES_SHOWN]
    more = warning.count - len(shown)
    listed = ", ".join(map(str, shown)) + (f" and {more} more" if more else "")
    return f"line{'' if warning.count == 1 else 's'} {listed}"


def files_valid(warnings: int) -> str:
    """Why a job waits whose files can train."""
    if not warnings:
        return "The files are valid; the job waits for an engine."
    noun = (
        "1 kind of warning (its event says" if warnings == 1 else f"{warnings} kinds of warnings (events say"
    )
    return f"The files can train, with {noun} which lines); the job waits for an engine."


def file_error(param: str, dataset: str, findings: Sequence[FileFinding], count: int) -> JobError:
    """Why a file cannot train: the code of a finding about the whole file, or `invalid_<param>`."""
    noun = param.replace("_", " ")
    whole = [finding for finding in findings if finding.line == 0]
    if whole:
        return JobError(whole[0].code or f"invalid_{param}", whole[0].message, param)
    shown = "; ".join(_finding(finding) for finding in findings[:3])
    problems = "1 problem" if count == 1 else f"{count} problems"
    more = f"; {count - 3} more are in its report" if count > 3 else ""
    message = f"The {noun} {dataset} has {problems}: {shown}{more}. Correct the lines and upload it again."
    return JobError(f"invalid_{param}", message, param)


def _finding(finding: FileFinding) -> str:
    where = f"line {finding.line}" + (f", {finding.field}" if finding.field else "")
    return f"{where}: {finding.message.rstrip('.')}"


def parent_deleted(model: str) -> JobError:
    text = f"The model {model}, which the job goes on from, was deleted; create a job on another model."
    return JobError(PARENT_DELETED, text, "model")


def duration(seconds: float) -> str:
    """In words, one unit: `40 seconds`, `3 minutes`, `2 hours`."""
    for size, unit in ((3600, "hour"), (60, "minute"), (1, "second")):
        if seconds >= size or unit == "second":
            count = max(1, round(seconds / size))
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "1 second"


def results_csv(metrics: Iterable[StepMetrics]) -> bytes:
    """OpenAI's result file: one row per step, ascending; an absent value is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    for row in metrics:
        writer.writerow(
            [
                row.step,
                _cell(row.train_loss),
                _cell(row.train_mean_token_accuracy),
                _cell(row.valid_loss),
                _cell(row.valid_mean_token_accuracy),
            ]
        )
    return out.getvalue().encode()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
