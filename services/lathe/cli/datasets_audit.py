"""The commands of `lathe datasets` that need a model: audit, preview."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated

import typer

from lathe.cli import exits
from lathe.cli.connection import client_of
from lathe.cli.dataset_report import STATISTICS, report_lines, share_lines, statistics_rows
from lathe.cli.output import JSON, console, note, print_json, print_table
from lathe.v1 import datasets_pb2 as pb

DATASET = Annotated[str, typer.Argument(help="file-…")]
MODEL = Annotated[str, typer.Option(help="The model to tune: a base model or a tuned one.")]
METHOD = Annotated[str, typer.Option(help="supervised, dpo, orpo or kto.")]
LIMIT = Annotated[int, typer.Option(help="Most tokens of a row; the model's own context if unset.")]
TRUNCATION = Annotated[str, typer.Option(help="end cuts longer rows, error refuses them.")]
# What is trained, where there are no colours.
_OPEN, _CLOSE = "⟦", "⟧"


def register(app: typer.Typer) -> None:
    """Add the commands to `lathe datasets`."""
    app.command()(audit)
    app.command()(preview)


def audit(
    context: typer.Context,
    dataset: DATASET,
    model: MODEL,
    validation: Annotated[str, typer.Option(help="The validation file: rows of both are told.")] = "",
    method: METHOD = "supervised",
    context_limit: LIMIT = 0,
    truncation: TRUNCATION = "end",
    as_json: JSON = False,
) -> None:
    """What a job on this model would find in the dataset, over all its rows."""
    with client_of(context) as client:
        found = client.datasets.audit(
            dataset,
            model,
            method=method,
            context_limit=context_limit,
            truncation=truncation,
            validation_dataset=validation,
        )
    if as_json:
        print_json(found)
    else:
        print_audit(found)
    if found.state != pb.AUDIT_STATE_READY:
        raise typer.Exit(exits.INVALID)


def preview(
    context: typer.Context,
    dataset: DATASET,
    model: MODEL,
    line: Annotated[
        list[int] | None, typer.Option(help="Line of the file; several times for several.")
    ] = None,
    method: METHOD = "supervised",
    context_limit: LIMIT = 0,
    truncation: TRUNCATION = "end",
    as_json: JSON = False,
) -> None:
    """Rows as the model would see them, what is trained in colour (between ⟦ and ⟧ where there is none)."""
    with client_of(context) as client:
        found = client.datasets.preview(
            dataset, model, line or [], method=method, context_limit=context_limit, truncation=truncation
        )
    if as_json:
        print_json(found)
    else:
        for sequence in found.sequences:
            print_sequence(sequence)
        for text in missing_lines(found, line or []):
            note(text)
        if found.state != pb.AUDIT_STATE_READY:
            for text in report_lines(found.report):
                note(text)
    if found.state != pb.AUDIT_STATE_READY:
        raise typer.Exit(exits.INVALID)


def missing_lines(found: pb.PreviewDatasetResponse, lines: Sequence[int]) -> Iterator[str]:
    """What is said of the lines that were asked for and are not shown."""
    if found.state == pb.AUDIT_STATE_READY:
        why = "one answer has no room for it beside the others; ask for it by itself"
    else:
        why = "it, or the file as a whole, has an error"
    for line in sorted(set(lines) - {sequence.line for sequence in found.sequences}):
        yield f"line {line} is not shown: {why}"


def stretches(sequence: pb.PreviewSequence) -> Iterator[tuple[str, bool]]:
    """The text in stretches that are trained or not."""
    for trained, tokens in groupby(sequence.tokens, key=lambda token: token.trained):
        yield "".join(token.text for token in tokens), trained


def print_audit(found: pb.Audit) -> None:
    """Numbers and distributions on standard output, findings beside them."""
    if found.state == pb.AUDIT_STATE_READY:
        note(
            f"{found.report.example_count} examples, {found.rows} rows, {found.tokens} tokens, "
            f"{found.trained_tokens} of them trained."
        )
        print_table(STATISTICS, statistics_rows(found.report.statistics), "")
        for text in share_lines(found.report.statistics):
            print(text)
    for text in report_lines(found.report):
        note(text)


def print_sequence(sequence: pb.PreviewSequence) -> None:
    """One sequence, what is trained of it marked."""
    from rich.text import Text

    out = console()
    role = "" if sequence.role == "example" else f", {sequence.role}"
    shown = len(sequence.tokens)
    more = f", the first {shown} shown" if shown < sequence.token_count else ""
    note(
        f"line {sequence.line}{role}: {sequence.token_count} tokens, {sequence.trained_token_count} trained{more}"
    )
    if not out.is_terminal:
        print("".join(f"{_OPEN}{text}{_CLOSE}" if trained else text for text, trained in stretches(sequence)))
        return
    out.print(
        Text.assemble(*((text, "black on green" if trained else "") for text, trained in stretches(sequence)))
    )
