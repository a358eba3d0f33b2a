"""A report on a dataset, for people."""

from collections.abc import Iterator

from lathe.cli.optionwords import in_options
from lathe.cli.output import enum_word, note
from lathe.v1 import datasets_pb2 as pb

_LINES_SHOWN = 10


def say_report(report: pb.ValidationReport, ready: bool) -> None:
    """Print it on standard error."""
    if ready:
        note(f"{report.example_count} examples, ready.")
    for line in report_lines(report):
        note(line)


def report_lines(report: pb.ValidationReport) -> Iterator[str]:
    """The first findings by line, what is not among them by code, and what to do."""
    for finding in report.findings:
        where = f"line {finding.line}" if finding.line else "file"
        yield f"  {where}{', ' + finding.field if finding.field else ''}: {in_options(finding.message)}"
    if report.finding_count > len(report.findings):
        yield f"  and {report.finding_count - len(report.findings)} more findings."
    for group in report.groups:
        severity = enum_word(pb.Severity.DESCRIPTOR, group.severity)
        yield f"{severity} {group.code} ({_lines(group)}): {group.advice}"


STATISTICS = ("", "min", "p10", "median", "mean", "p90", "p99", "max")


def statistics_rows(statistics: pb.Statistics) -> Iterator[tuple[str, ...]]:
    """The distributions of an audit under STATISTICS."""
    for name, found in (
        ("prompt tokens", statistics.prompt_tokens),
        ("completion tokens", statistics.completion_tokens),
        ("tokens of a turn", statistics.turn_tokens),
        ("tokens of a row", statistics.row_tokens),
        ("messages of a row", statistics.turns),
    ):
        middle = (found.p10, found.median, f"{found.mean:.1f}", found.p90, found.p99)
        yield (name, *map(str, (found.min, *middle, found.max)))


def share_lines(statistics: pb.Statistics) -> Iterator[str]:
    """Languages and, where they are few, answers."""
    for name, found in (("languages", statistics.languages), ("answers", statistics.answers)):
        if found:
            yield f"{name}: " + ", ".join(f"{share.value} {share.count}" for share in found)


def _lines(group: pb.FindingGroup) -> str:
    """`lines 3, 7, 9 and 40 more`"""
    if 0 in group.first_lines:
        return "the whole file"
    shown = list(group.first_lines)[:_LINES_SHOWN]
    more = group.count - len(shown)
    return (
        ("line " if group.count == 1 else "lines ")
        + ", ".join(map(str, shown))
        + (f" and {more} more" if more else "")
    )
