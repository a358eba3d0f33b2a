"""What `lathe datasets audit` and `preview` print."""

from __future__ import annotations

from lathe.cli.dataset_report import report_lines, share_lines, statistics_rows
from lathe.cli.datasets_audit import missing_lines, stretches
from lathe.v1 import datasets_pb2 as pb


def test_trained_stretches_are_joined():
    sequence = pb.PreviewSequence(line=1)
    for text, trained in (("<user>", False), (" Hi", False), ("Hel", True), ("lo", True), ("\n", False)):
        sequence.tokens.add(text=text, trained=trained)
    assert list(stretches(sequence)) == [("<user> Hi", False), ("Hello", True), ("\n", False)]


def test_lines_that_are_not_shown_are_told():
    found = pb.PreviewDatasetResponse(state=pb.AUDIT_STATE_ERROR, sequences=[pb.PreviewSequence(line=3)])
    assert list(missing_lines(found, [2, 3])) == [
        "line 2 is not shown: it, or the file as a whole, has an error"
    ]
    found.state = pb.AUDIT_STATE_READY
    assert list(missing_lines(found, [3])) == []
    (text,) = missing_lines(found, [4])
    assert "no room" in text


def test_groups_say_which_lines_and_what_to_do():
    report = pb.ValidationReport(example_count=40, finding_count=13)
    report.findings.add(line=3, field="messages[0].content", code="email", message="an address")
    lines = list(range(3, 15))
    report.groups.add(code="email", severity=pb.SEVERITY_NOTE, count=12, first_lines=lines, advice="Look.")
    report.groups.add(
        code="label_imbalance", severity=pb.SEVERITY_WARNING, count=1, first_lines=[0], advice="Add."
    )
    assert list(report_lines(report)) == [
        "  line 3, messages[0].content: an address",
        "  and 12 more findings.",
        "note email (lines 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 2 more): Look.",
        "warning label_imbalance (the whole file): Add.",
    ]


def test_statistics_are_a_table():
    statistics = pb.Statistics(
        turns=pb.Distribution(count=2, min=2, p10=2, median=2, mean=2.5, p90=3, p99=3, max=3)
    )
    statistics.languages.add(value="en", count=2)
    assert list(statistics_rows(statistics))[-1] == ("messages of a row", "2", "2", "2", "2.5", "3", "3", "3")
    assert list(share_lines(statistics)) == ["languages: en 2"]
