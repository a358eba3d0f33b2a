"""`lathe lineage`: which rows trained a model, and which models saw a row."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from lathe.cli.connection import client_of
from lathe.cli.output import JSON, note, plain, print_facts, print_json, print_table, state_word
from lathe.client.lineage import ModelLineage, RowLineage, Training
from lathe.client.names import last_id
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2, models_pb2

app = typer.Typer(no_args_is_help=True, help="Which rows trained a model, and which models saw a row.")
_MAX_ROW_BYTES = 3 << 20


@app.command()
def model(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A tuned model, ft:…")],
    as_json: JSON = False,
) -> None:
    """The jobs that a model is made of, its own first, and the rows that each of them trained on."""
    with client_of(context) as client:
        found = client.lineage.of_model(name)
    if as_json:
        print_json(_model_json(found))
        return
    for training in found.trainings:
        print_facts(_facts(training))
        note("")
    if found.missing_parent:
        note(
            f"It goes on from {found.missing_parent}, which was deleted: what that one was trained on is not known."
        )


@app.command()
def row(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="file-… or the path of a JSONL file.")],
    line: Annotated[int, typer.Argument(help="Which line of it, counted from 1.", min=1)],
    as_json: JSON = False,
) -> None:
    """The datasets that have a row, in whatever format and spelling, and the models that were trained on it."""
    path = Path(file)
    with client_of(context) as client:
        if path.is_file():
            found = client.lineage.of_row(row=line_of(path, line))
        else:
            found = client.lineage.of_row(dataset=file, line=line)
    if as_json:
        print_json(_row_json(found))
        return
    note(f"The row {found.found.digest}:")
    places = (
        (last_id(place.dataset.name), place.dataset.display_name, _lines(place))
        for place in found.found.places
    )
    print_table(("dataset", "file", "lines"), places, "No dataset of the project has it.")
    print_table(("model", "step", "how"), _models(found), "No model that is there was trained on it.")
    for job in found.running:
        note(f"{last_id(job.name)} is {state_word(job)} and trains on it.")
    if found.unknown:
        note(
            f"Of {len(found.unknown)} model(s) it cannot be said, because a dataset or a model that they come from has "
            f"been deleted: {', '.join(sorted({each.model_id for each in found.unknown}))}"
        )


def line_of(path: Path, line: int) -> str:
    """A line of a local file. Raises InvalidArgument where it has no such line, or none that is a row."""
    try:
        with path.open("rb") as file:
            data = next(islice(file, line - 1, None), b"")
        text = data.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"Line {line} of {path} cannot be read: {error}.") from error
    if not text:
        raise InvalidArgument(f"{path} has no row on line {line}.")
    if len(data) > _MAX_ROW_BYTES:
        raise InvalidArgument(
            f"Line {line} of {path} is too long to be sent; upload the file and name its id."
        )
    return text


def _facts(training: Training) -> Iterator[tuple[str, str]]:
    adapter, lineage, rows = training.adapter, training.adapter.lineage, training.rows
    yield "model", adapter.model_id
    yield (
        "job",
        f"{last_id(lineage.job)}{'' if training.job is not None else ' (deleted)'}, step {lineage.step}",
    )
    yield "method", lineage.method or "supervised"
    there = ", ".join(f"{last_id(each.name)} ({each.display_name})" for each in rows.datasets)
    yield "rows", there or "in a dataset that was deleted"
    yield "sha256", lineage.dataset_sha256
    if rows.HasField("audit"):
        yield "trained", _trained(rows)
    yield "goes on from", lineage.parent_model_id or "the base model"


def _trained(rows: datasets_pb2.TrainedRows) -> str:
    audit = rows.audit
    cut = f", {audit.truncated_rows} of them cut" if audit.truncated_rows else ", none cut"
    return f"all {audit.report.example_count} rows{cut}; {audit.trained_tokens} of {audit.tokens} tokens"


def _lines(place: datasets_pb2.RowPlaces) -> str:
    more = place.count - len(place.first_lines)
    return ", ".join(map(str, place.first_lines)) + (f" and {more} more" if more else "")


def _models(found: RowLineage) -> Iterator[tuple[str, str, str]]:
    for adapter in found.models:
        yield adapter.model_id, str(adapter.lineage.step), "trained on it"
    for adapter in found.descendants:
        yield adapter.model_id, str(adapter.lineage.step), f"goes on from {adapter.lineage.parent_model_id}"


def _model_json(found: ModelLineage) -> dict[str, Any]:
    trainings = [
        {
            "adapter": plain(each.adapter),
            "job": plain(each.job) if each.job is not None else None,
            "rows": plain(each.rows),
        }
        for each in found.trainings
    ]
    return {"trainings": trainings, "missing_parent": found.missing_parent}


def _row_json(found: RowLineage) -> dict[str, Any]:
    def all_plain(adapters: tuple[models_pb2.Adapter, ...]) -> list[dict[str, Any]]:
        return [plain(each) for each in adapters]

    return {
        "found": plain(found.found),
        "models": all_plain(found.models),
        "descendants": all_plain(found.descendants),
        "running": [plain(job) for job in found.running],
        "unknown": all_plain(found.unknown),
    }
