"""`lathe datasets check`: everything that is to be known of a file before it is trained on, in one command."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from lathe.cli import exits
from lathe.cli.connection import client_of
from lathe.cli.dataset_report import say_report
from lathe.cli.datasets_audit import METHOD, MODEL, print_audit, print_sequence
from lathe.cli.estimates import answer_lines
from lathe.cli.output import JSON, note, plain, print_json
from lathe.cli.training_files import check_job
from lathe.client import Client
from lathe.client.jobsettings import asked_settings
from lathe.client.names import last_id
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2 as pb
from lathe.v1 import jobs_pb2

# How many of the newest datasets are looked through for the same file.
_LOOKED_THROUGH = 500
_SETTLING = (pb.DATASET_STATE_VALIDATING, pb.DATASET_STATE_READY)


def columns_of(given: Sequence[str], option: str) -> dict[str, str]:
    """KEY=COLUMN pairs of a command line. Raises BadParameter."""
    columns: dict[str, str] = {}
    for pair in given:
        key, equals, column = pair.partition("=")
        if not (key and equals and column) or key in columns:
            raise typer.BadParameter(f"{pair!r} must be KEY=COLUMN, each key once.", param_hint=option)
        columns[key] = column
    return columns


def check(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="The file of examples.", exists=True, dir_okay=False)],
    model: MODEL,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            "--map",
            metavar="KEY=COLUMN",
            help="Which column is which key of an example; repeatable.",
        ),
    ] = None,
    file_type: Annotated[str, typer.Option(help="jsonl, json, csv or parquet; by the file's name.")] = "",
    method: METHOD = "supervised",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the job, such as n_epochs=1."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Convert, upload (unless it is there), audit and preview a file, and say what a job on it would take.

    Exit code 3 if it cannot be trained on.
    """
    mapped = columns_of(columns or [], "--column")
    wanted = asked_settings(method, settings or [], {})
    audit, preview, answer = pb.Audit(), pb.PreviewDatasetResponse(), jobs_pb2.EstimateJobResponse()
    with client_of(context) as client:
        check_job(client, model, method=method, settings=wanted)
        dataset, known = _uploaded(client, path, file_type, mapped)
        if dataset.state == pb.DATASET_STATE_READY:
            audit = client.datasets.audit(dataset.name, model, method=method)
        usable = audit.state == pb.AUDIT_STATE_READY
        if usable:
            preview = client.datasets.preview(dataset.name, model, method=method)
            answer = client.jobs.estimate(model, dataset.name, method=method, settings=wanted)
    if as_json:
        parts = {"dataset": dataset, "audit": audit, "preview": preview, "estimate": answer}
        print_json({name: plain(part) for name, part in parts.items()})
    else:
        note(f"{last_id(dataset.name)}{': the same file is there already' if known else ''}")
        if dataset.state == pb.DATASET_STATE_ERROR:
            say_report(dataset.report, ready=False)
        else:
            print_audit(audit)
        for sequence in preview.sequences:
            print_sequence(sequence)
        for line in answer_lines(answer) if usable else ():
            print(line)
    if not usable:
        raise typer.Exit(exits.INVALID)


def _uploaded(
    client: Client, path: Path, file_type: str, columns: Mapping[str, str]
) -> tuple[pb.Dataset, bool]:
    """The dataset of the file, once it is validated; and whether it was there before."""
    digest = _sha256(path)
    recent = islice(client.datasets.list("fine-tune"), _LOOKED_THROUGH)
    found = next((one for one in recent if is_same(one, digest, file_type, columns)), None)
    if found is None:
        found = client.datasets.upload(path, file_type=file_type, columns=columns)
        return client.datasets.wait(found.name), False
    return client.datasets.wait(found.name), True


def is_same(dataset: pb.Dataset, sha256: str, file_type: str, columns: Mapping[str, str]) -> bool:
    """Whether a dataset was made from the same bytes in the same way."""
    options = dataset.import_options
    return (
        dataset.state in _SETTLING
        and sha256 == (dataset.source_sha256 or dataset.sha256)
        and dict(options.columns) == dict(columns)
        and (not file_type or file_type == (options.file_type or "jsonl"))
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.") from error
