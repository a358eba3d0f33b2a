"""What a job would find, and rows as the model sees them, before there is a job."""

from __future__ import annotations

import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument, NotFound
from lathe.v1 import datasets_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import jsonl, row

ROWS = [row(f"What is the number {n} of the list?", f"It is the word {n}.") for n in range(20)]


def test_an_audit_tells_what_a_job_would_find(client: Client, base_model: str, upload: Upload) -> None:
    train = upload(jsonl([*ROWS, ROWS[4], row("Write to ann@firma.de!", "She has her answer.")]))
    valid = upload(jsonl([*(row(f"Which is {n}?", f"That is {n}.") for n in range(12)), ROWS[7]]))
    found = client.datasets.audit(train.name, base_model, validation_dataset=valid.name)
    assert found.state == datasets_pb2.AUDIT_STATE_READY
    assert not (found.object_key or found.findings_object_key)
    groups = {group.code: (list(group.first_lines), group.severity) for group in found.report.groups}
    assert groups["duplicate"] == ([21], datasets_pb2.SEVERITY_WARNING)
    assert groups["validation_duplicate"] == ([8], datasets_pb2.SEVERITY_WARNING)
    assert groups["email"] == ([22], datasets_pb2.SEVERITY_NOTE)
    assert all(group.advice for group in found.report.groups)
    statistics = found.report.statistics
    assert statistics.row_tokens.count == found.rows == 22 and statistics.turns.median == 3
    with pytest.raises(NotFound):
        client.datasets.audit(train.name, "no-such-model")


def test_a_preview_shows_what_is_trained(client: Client, base_model: str, upload: Upload) -> None:
    dataset = upload(jsonl(ROWS))
    shown = client.datasets.preview(dataset.name, base_model, [3])
    (sequence,) = shown.sequences
    assert (sequence.line, sequence.role) == (3, "example")
    trained = "".join(token.text for token in sequence.tokens if token.trained)
    assert trained == "It is the word 2.<|im_end|>"
    assert sequence.trained_token_count < sequence.token_count == len(sequence.tokens)
    with pytest.raises(InvalidArgument, match="line 99"):
        client.datasets.preview(dataset.name, base_model, [99])
