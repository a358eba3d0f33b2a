"""`lathe doctor`: what works and what does not, from outside and from inside, and what to do about it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

import typer

from lathe.cli import exits
from lathe.cli.connection import connection
from lathe.cli.examination import Checked, examine
from lathe.cli.output import JSON, note, print_json
from lathe.common.diagnosis import Severity

_MARKS = {Severity.OK: "ok  ", Severity.WARNING: "warn", Severity.FAILED: "FAIL"}


def doctor(
    context: typer.Context,
    http: Annotated[
        str | None, typer.Option(help="URL of the OpenAI door, if it is not on the host's port 8080.")
    ] = None,
    kubernetes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMESPACE[/RELEASE]",
            help="Read the pods of an installation through kubectl instead: for one that does not answer yet.",
        ),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Examine a platform: one sentence per finding, and what to do. Ends with 1 if something does not work."""
    if kubernetes is not None:
        from lathe.cli.kubernetes import examine_kubernetes

        raise typer.Exit(_report(f"the namespace {kubernetes}", examine_kubernetes(kubernetes), as_json))
    target = connection(context).target()
    target = replace(target, http=(http or target.http).rstrip("/"))
    raise typer.Exit(_report(f"{target.address} ({target.source})", examine(target), as_json))


def _report(what: str, found: Iterable[Checked], as_json: bool) -> int:
    """Print findings as they come; the exit code."""
    if not as_json:
        note(f"Examining {what}.")
    seen = []
    for one in found:
        seen.append(one)
        if not as_json:
            print(line(one), flush=True)
    failed = sum(not one.finding.ok for one in seen)
    if as_json:
        print_json({"target": what, "ok": failed == 0, "findings": [as_document(one) for one in seen]})
    else:
        warned = sum(one.finding.severity is Severity.WARNING for one in seen)
        note(f"{len(seen)} findings: {failed} failed, {warned} warnings.")
    return exits.FAILED if failed else exits.OK


def line(one: Checked) -> str:
    """A finding for people, its advice below it."""
    finding = one.finding
    text = f"{_MARKS[finding.severity]}  {one.where:<9} {finding.name}: {finding.message}"
    return f"{text}\n      {'':<9} → {finding.advice}" if finding.advice else text


def as_document(one: Checked) -> dict[str, str]:
    """A finding for programs."""
    finding = one.finding
    return {
        "where": one.where,
        "name": finding.name,
        "severity": finding.severity.value,
        "message": finding.message,
        "advice": finding.advice,
    }
