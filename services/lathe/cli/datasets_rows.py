"""The commands of `lathe datasets` that work with rows: split, dedupe, drop, sample, truncate, diff, freeze,
thaw."""

import re
from typing import Annotated, Any

import typer

from lathe.cli import exits
from lathe.cli.connection import client_of
from lathe.cli.dataset_report import say_report
from lathe.cli.output import JSON, note, print_json, print_messages, print_table
from lathe.client.names import last_id
from lathe.client.rows import dedupe_operation, drop_operation, split_operation, truncate_operation
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2 as pb

_SHOWN = 10
_MAX_LINES = 10_000
_RANGE = re.compile(r"(?P<first>[0-9]{1,12})(-(?P<last>[0-9]{1,12}))?", re.ASCII)
DATASET = Annotated[str, typer.Argument(help="file-…")]
SEED = Annotated[int, typer.Option(help="Another seed draws other rows; the same seed the same ones.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Only count the rows; make nothing.")]
METHOD = Annotated[str, typer.Option(help="What the audit is for: supervised if unset, dpo, orpo or kto.")]
WAIT = Annotated[bool, typer.Option(help="Wait until it is written and validated.")]


def split(
    context: typer.Context,
    dataset: DATASET,
    fraction: Annotated[float, typer.Option(help="The share of rows to hold out, such as 0.1.")] = 0.0,
    count: Annotated[int, typer.Option(help="So many rows to hold out, instead of a share.")] = 0,
    by: Annotated[
        str,
        typer.Option(
            help="Keep the shares of its values: answer, answer.KEY, or a path such as messages[0].content."
        ),
    ] = "",
    seed: SEED = 0,
    dry_run: DRY_RUN = False,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """Two datasets: the rows to train on, then those held out. Equal rows are never parted."""
    operation = split_operation(fraction=fraction, count=count, seed=seed, stratify_by=by)
    _run(context, dataset, operation, dry_run=dry_run, wait=wait, as_json=as_json)


def dedupe(
    context: typer.Context,
    dataset: DATASET,
    near: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Leave out near duplicates too, as the audit for a base model finds them."
        ),
    ] = "",
    method: METHOD = "",
    dry_run: DRY_RUN = False,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """A dataset of the first of each set of equal rows."""
    operation = dedupe_operation(near, pb.AuditOptions(method=method))
    _run(context, dataset, operation, dry_run=dry_run, wait=wait, as_json=as_json)


def drop(
    context: typer.Context,
    dataset: DATASET,
    lines: Annotated[str, typer.Option(help="Which, such as 3,17,40-52.")] = "",
    finding: Annotated[
        list[str] | None,
        typer.Option(help="All lines with a finding of the audit, such as truncated or email; repeatable."),
    ] = None,
    model: Annotated[str, typer.Option(help="The base model of the audit; with --finding.")] = "",
    method: METHOD = "",
    context_limit: Annotated[int, typer.Option(help="Tokens; the model's own limit if unset.")] = 0,
    dry_run: DRY_RUN = False,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """A dataset without some of its lines."""
    if not lines and not finding:
        raise InvalidArgument("Say what to drop: --lines 3,17,40-52, or --finding CODE with --model.")
    if finding and not model:
        raise InvalidArgument("--finding needs --model: the base model whose audit found it.")
    operation = drop_operation(
        parsed_lines(lines) if lines else [],
        finding or [],
        model,
        pb.AuditOptions(method=method, context_limit=context_limit),
    )
    _run(context, dataset, operation, dry_run=dry_run, wait=wait, as_json=as_json)


def sample(
    context: typer.Context,
    dataset: DATASET,
    count: Annotated[int, typer.Option(help="How many rows.")],
    seed: SEED = 0,
    dry_run: DRY_RUN = False,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """A dataset of some rows, chosen at random."""
    operation = pb.DatasetOperation(sample=pb.SampleRows(seed=seed, count=count))
    _run(context, dataset, operation, dry_run=dry_run, wait=wait, as_json=as_json)


def truncate(
    context: typer.Context,
    dataset: DATASET,
    model: Annotated[str, typer.Option(help="The base model whose template and tokens count.")],
    limit: Annotated[
        int,
        typer.Option(
            "--limit", "--context-limit", help="Tokens a row may have; the model's own limit if unset."
        ),
    ] = 0,
    policy: Annotated[
        str,
        typer.Option(help="drop_oldest turns, cut_end (the last turns), or drop_row."),
    ] = "drop_oldest",
    keep_unfit: Annotated[
        bool,
        typer.Option("--keep-unfit", help="Keep rows that cannot be made to fit; else they are dropped."),
    ] = False,
    method: METHOD = "",
    dry_run: DRY_RUN = False,
    wait: WAIT = True,
    as_json: JSON = False,
) -> None:
    """A dataset in which rows that are too long are shorter, turn by turn."""
    options = pb.AuditOptions(method=method, context_limit=limit)
    operation = truncate_operation(model, options, policy, keep_unfit=keep_unfit)
    _run(context, dataset, operation, dry_run=dry_run, wait=wait, as_json=as_json)


def diff(
    context: typer.Context,
    dataset: DATASET,
    other: Annotated[str, typer.Argument(help="file-…, with which it is compared.")],
    as_json: JSON = False,
) -> None:
    """Which rows two datasets share, in whatever order, format and spelling."""
    with client_of(context) as client:
        found = client.datasets.diff(dataset, other)
    if as_json:
        print_json(found)
        return
    rows = (
        (f"only in {dataset}", found.only_in_first, "line"),
        (f"only in {other}", found.only_in_second, "other_line"),
        ("in both", found.in_both, ""),
        ("moved", found.moved, ""),
    )
    table = ((what, str(part.count), _first_lines(part, field)) for what, part, field in rows)
    print_table(("", "rows", "first lines"), table, "")


def freeze(
    context: typer.Context,
    dataset: DATASET,
    name: Annotated[str, typer.Argument(help="Its name as a held-out set.")],
    as_json: JSON = False,
) -> None:
    """Keep a dataset as a held-out set: no job trains on a file with one of its rows from now on."""
    with client_of(context) as client:
        frozen = client.datasets.freeze(dataset, name)
    if as_json:
        print_json(frozen)
    else:
        note(f"{dataset} is frozen as {name}. A job may validate on it, and train on none of its rows.")


def thaw(context: typer.Context, dataset: DATASET, as_json: JSON = False) -> None:
    """Let a held-out set be an ordinary dataset again; for admins."""
    with client_of(context) as client:
        thawed = client.datasets.thaw(dataset)
    if as_json:
        print_json(thawed)
    else:
        note(f"{dataset} is no held-out set any more.")


def register(app: typer.Typer) -> None:
    """Add the commands to the group."""
    for command in (split, dedupe, drop, sample, truncate, diff, freeze, thaw):
        app.command()(command)


def said(made: pb.DatasetPreparation) -> str:
    """`split of file-1 (train): seed 1, fraction 0.1`; empty for an upload."""
    kind = made.operation.WhichOneof("operation")
    if kind is None:
        return ""
    settings = getattr(made.operation, kind).ListFields()
    words = ((field.name, _value(field, value)) for field, value in settings)
    shown = ", ".join(f"{name} {value}" for name, value in words if value)
    parents = " and ".join(last_id(parent.name) for parent in made.parents)
    part = f" ({made.part})" if made.part else ""
    return f"{kind} of {parents}{part}{': ' if shown else ''}{shown}"


def _value(field: Any, value: Any) -> str:
    """A setting on one line; of a long list its beginning."""
    if field.is_repeated:
        return "+".join(map(str, value[:_SHOWN])) + ("+…" if len(value) > _SHOWN else "")
    return " ".join(str(value).split())


def parsed_lines(text: str) -> list[int]:
    """`3,17,40-52` as lines. Raises InvalidArgument."""
    lines: set[int] = set()
    for part in text.split(","):
        range_ = _RANGE.fullmatch(part.strip())
        if range_ is None:
            raise InvalidArgument(f"--lines {text!r} must be lines and ranges of lines, such as 3,17,40-52.")
        first, last = int(range_["first"]), int(range_["last"] or range_["first"])
        if first > last:
            raise InvalidArgument(f"--lines {text!r}: the range {part.strip()} ends before it begins.")
        if last - first >= _MAX_LINES:
            raise InvalidArgument(
                f"--lines {text!r} names more than {_MAX_LINES} lines; sample or split instead."
            )
        lines.update(range(first, last + 1))
    return sorted(lines)


def _run(
    context: typer.Context,
    dataset: str,
    operation: pb.DatasetOperation,
    *,
    dry_run: bool,
    wait: bool,
    as_json: bool,
) -> None:
    with client_of(context) as client:
        if dry_run:
            _say_counts(client.datasets.count(dataset, operation), as_json)
            return
        made = client.datasets.prepare(dataset, operation)
        if wait:
            made = [client.datasets.wait(each.name) for each in made]
    if as_json:
        print_messages(made)
    else:
        for each in made:
            print(last_id(each.name))
            note(f"{each.display_name}:")
            say_report(each.report, each.state == pb.DATASET_STATE_READY)
    if any(each.state == pb.DATASET_STATE_ERROR for each in made):
        raise typer.Exit(exits.INVALID)


def _say_counts(counted: pb.PrepareDatasetResponse, as_json: bool) -> None:
    if as_json:
        print_json(counted)
        return
    for each in counted.prepared:
        changed = ((each.shortened_rows, "made shorter"), (each.unfit_rows, "longer than the limit still"))
        shown = "".join(f", {number} {what}" for number, what in changed if number)
        note(f"{each.part.replace('_', ' ') or 'the dataset'}: {each.rows} of {counted.rows} rows{shown}")


def _first_lines(part: pb.DiffRows, field: str) -> str:
    def shown(row: pb.DiffRow) -> str:
        return str(getattr(row, field)) if field else f"{row.line}→{row.other_line}"

    more = ", …" if part.count > len(part.first) else ""
    return ", ".join(map(shown, part.first)) + more
