"""`lathe datasets`: files of examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lathe.cli import datasets_audit, datasets_rows, exits
from lathe.cli.connection import client_of
from lathe.cli.dataset_report import say_report
from lathe.cli.datasets_check import check, columns_of
from lathe.cli.output import (
    JSON,
    note,
    print_facts,
    print_json,
    print_messages,
    print_table,
    size,
    state_word,
    when,
)
from lathe.client.datasets import Progress
from lathe.client.names import last_id
from lathe.v1 import datasets_pb2 as pb

app = typer.Typer(no_args_is_help=True, help="Files of examples to tune on.")
DATASET = Annotated[str, typer.Argument(help="file-…")]
FILE_TYPE = Annotated[str, typer.Option(help="jsonl, json, csv or parquet; by the file's name if not given.")]
COLUMN = Annotated[
    list[str] | None,
    typer.Option(
        help="KEY=COLUMN, once for each: which column is which key of an example, such as question=Ticket."
    ),
]
WAIT = Annotated[bool, typer.Option(help="Wait until it is validated.")]


@app.command()
def upload(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            help="Examples: JSONL, one a line; also CSV, Parquet and JSON.", exists=True, dir_okay=False
        ),
    ],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    file_type: FILE_TYPE = "",
    column: COLUMN = None,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """Upload a file and have it validated; a broken connection goes on where it was."""
    with client_of(context) as client:
        with _bar("Uploading", as_json) as progress:
            dataset = client.datasets.upload(
                path,
                purpose,
                file_type=file_type,
                columns=columns_of(column or [], "--column"),
                progress=progress,
            )
        if wait:
            dataset = client.datasets.wait(dataset.name)
    _say(dataset, as_json)


@app.command(name="import")
def import_(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help="https://…, s3://bucket/key, or hf:owner/name[:config/split]."),
    ],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    file_type: FILE_TYPE = "",
    column: COLUMN = None,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """Have the platform fetch a file and validate it."""
    with client_of(context) as client:
        dataset = client.datasets.import_from(
            source, purpose, file_type=file_type, columns=columns_of(column or [], "--column")
        )
        if wait:
            dataset = client.datasets.wait(dataset.name, timeout=3600)
    _say(dataset, as_json)


def _say(dataset: pb.Dataset, as_json: bool) -> None:
    if as_json:
        print_json(dataset)
    else:
        print(last_id(dataset.name))
        say_report(dataset.report, dataset.state == pb.DATASET_STATE_READY)
    if dataset.state == pb.DATASET_STATE_ERROR:
        raise typer.Exit(exits.INVALID)


@app.command(name="list")
def list_(
    context: typer.Context,
    purpose: Annotated[str, typer.Option(help="Only files of this purpose.")] = "",
    as_json: JSON = False,
) -> None:
    """Your datasets, newest first."""
    with client_of(context) as client:
        datasets = list(client.datasets.list(purpose))
    if as_json:
        print_messages(datasets)
        return
    rows = (
        (
            last_id(dataset.name),
            dataset.display_name,
            dataset.purpose,
            state_word(dataset),
            str(dataset.report.example_count or ""),
            size(dataset.size_bytes),
            when(dataset.create_time),
        )
        for dataset in datasets
    )
    print_table(
        ("id", "file", "purpose", "state", "examples", "size", "created"), rows, "There are no datasets."
    )


@app.command()
def show(context: typer.Context, dataset: DATASET, as_json: JSON = False) -> None:
    """One dataset and what validation found."""
    with client_of(context) as client:
        found = client.datasets.get(dataset)
    if as_json:
        print_json(found)
        return
    print_facts(
        (
            ("id", last_id(found.name)),
            ("file", found.display_name),
            ("purpose", found.purpose),
            ("state", state_word(found)),
            ("examples", str(found.report.example_count or "")),
            ("format", found.report.format),
            ("written as", found.report.layout),
            ("size", size(found.size_bytes)),
            ("sha256", found.sha256),
            ("converted from", _source(found)),
            ("created", when(found.create_time)),
            ("expires", when(found.expire_time)),
            ("made by", datasets_rows.said(found.preparation)),
            ("frozen as", found.frozen_as),
        )
    )
    say_report(found.report, found.state == pb.DATASET_STATE_READY)


@app.command()
def download(
    context: typer.Context,
    dataset: DATASET,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; standard output if unset.")
    ] = None,
) -> None:
    """The bytes as they are stored."""
    with client_of(context) as client:
        pieces = client.datasets.download(dataset)
        if output is None:
            stream = typer.get_binary_stream("stdout")
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            return
        part = output.with_name(output.name + ".part")
        try:
            with part.open("wb") as file:
                file.writelines(pieces)
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)


@app.command()
def delete(context: typer.Context, dataset: DATASET, as_json: JSON = False) -> None:
    """Delete a dataset; what was tuned on it stays."""
    with client_of(context) as client:
        client.datasets.delete(dataset)
    if as_json:
        print_json({"deleted": dataset})
    else:
        note(f"{dataset} is deleted.")


app.command()(check)
datasets_rows.register(app)
datasets_audit.register(app)


def _source(dataset: pb.Dataset) -> str:
    if not dataset.source_sha256:
        return ""
    options = dataset.import_options
    names = ", ".join(f"{key}={column}" for key, column in sorted(options.columns.items()))
    kind = f"{options.file_type} ({names})" if names else options.file_type
    return f"{kind}, {size(dataset.source_size_bytes)}, sha256 {dataset.source_sha256}"


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Progress | None]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with Bar(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
