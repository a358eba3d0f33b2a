"""Codes, severities, and how findings are counted."""

import ast
from pathlib import Path

import lathe.datasets
import lathe.text
from lathe.text.findings import KINDS, MAX_FINDINGS, Finding, FindingGroup, Severity, Tally, kind_of

# Where a code stands among the arguments of what makes a finding.
_PLACES = {"RowError": 1, "Finding": 2, "whole_file": 0}


def _codes(source: str) -> set[str]:
    """Every literal code in a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            place = _PLACES.get(getattr(node.func, "id", ""))
            if place is not None and len(node.args) > place:
                constants = (part for part in ast.walk(node.args[place]) if isinstance(part, ast.Constant))
                found |= {part.value for part in constants if isinstance(part.value, str)}
    return found


def test_every_code_in_the_source_has_a_severity_and_an_advice():
    folders = [Path(module.__path__[0]) for module in (lathe.text, lathe.datasets)]
    used = set().union(*(_codes(path.read_text()) for folder in folders for path in folder.glob("*.py")))
    assert {"nothing_trained", "truncated", "wrong_format"} <= used
    assert used - KINDS.keys() == set()


def test_every_code_that_is_documented_is_one_that_the_source_can_give():
    folders = [Path(module.__path__[0]) for module in (lathe.text, lathe.datasets)]
    # The one lists them all; the other says which of them an operation understands.
    lists = {"findings.py", "operations.py"}
    paths = [path for folder in folders for path in folder.glob("*.py") if path.name not in lists]
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert KINDS.keys() - texts == set()


def test_meanings_and_advices_read_as_sentences():
    for code, kind in KINDS.items():
        assert not kind.meaning.endswith("."), code
        assert kind.advice.endswith(".") and kind.advice[0].isupper(), code


def test_an_unknown_code_is_an_error():
    assert kind_of("from_the_future").severity is Severity.ERROR


def test_the_gravest_findings_are_shown_first():
    tally = Tally()
    for line in range(1, 31):
        tally.add(Finding(line, "", "email", "an address"))
    assert not tally.has_errors
    tally.add(Finding(31, "", "truncated", "cut"))
    tally.add(Finding(32, "", "nothing_trained", "nothing"))
    first = tally.first()
    assert [finding.line for finding in first[:3]] == [32, 31, 1]
    assert len(first) == MAX_FINDINGS and tally.count == 32 and tally.has_errors
    assert tally.groups() == (
        FindingGroup("nothing_trained", 1, (32,)),
        FindingGroup("truncated", 1, (31,)),
        FindingGroup("email", 30, tuple(range(1, 21))),
    )


def test_a_code_counts_once_a_line():
    tally = Tally()
    for line in (1, 1, 2):
        tally.add(Finding(line, "", "email", "an address"))
    assert tally.groups() == (FindingGroup("email", 2, (1, 2)),)


def test_names_and_values_that_findings_quote_are_told_without_what_is_sensitive():
    key = "AKIA" + "Q7A8" * 4
    tally = Tally()
    tally.add(Finding(3, f"messages[0].{key}", "message_unrecognized_key", "unknown key"))
    tally.add(Finding(5, "messages[1].weight", "invalid_weight", 'must be 0 or 1, not "ann@firma.de"'))
    assert [(finding.field, finding.message) for finding in tally.first()] == [
        ("messages[0].(an AWS access key)", "unknown key"),
        ("messages[1].weight", 'must be 0 or 1, not "(an e-mail address)"'),
    ]
