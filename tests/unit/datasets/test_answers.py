"""Answers with many datasets or a long row stay below gRPC's 4 MiB."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from lathe.common.rpc.server import MAX_MESSAGE_BYTES
from lathe.datasets import protos
from lathe.datasets.model import MAX_FOUND_BYTES, Dataset, DatasetState, report_of
from lathe.datasets.operations import Drop, Parent, Preparation
from lathe.datasets.preparation import Found, Places
from lathe.text.findings import Finding, tally_of
from tests.unit.datasets.conftest import GOOD, row

FINDINGS = tally_of([Finding(line, "é" * 200, "invalid_json", "語" * 500) for line in range(1, 21)])
LARGE = Dataset(
    "acme",
    "file-1",
    "語" * 255,
    "fine-tune",
    DatasetState.ERROR,
    datetime(2026, 1, 1, tzinfo=UTC),
    sha256="a" * 64,
    report=report_of(0, FINDINGS),
    preparation=Preparation((Parent("file-0", "b" * 64),), Drop(tuple(range(1, 10_001)))),
)


def test_a_page_holds_as_many_datasets_as_fit():
    found = [replace(LARGE, id=f"file-{number}") for number in range(100)]
    page = protos.page_pb(found)
    assert [item.name for item in page] == [each.name for each in found[: len(page)]]
    assert 30 < len(page) < 100
    assert sum(item.ByteSize() for item in page) < MAX_MESSAGE_BYTES
    assert len(protos.page_pb([replace(each, report=None, preparation=None) for each in found])) == 100
    assert protos.page_pb([]) == []


def test_the_places_of_a_row_say_nothing_of_what_else_is_in_the_files():
    places = tuple(Places(replace(LARGE, preparation=None), 1, (1,)) for _ in range(2000))
    answer = protos.found_pb(Found(b"d" * 16, b"{}", places))
    assert answer.ByteSize() < MAX_MESSAGE_BYTES
    assert answer.places[0].dataset.sha256 == LARGE.sha256
    assert protos.trained_rows_pb([LARGE] * 2, None).datasets[0].HasField("report") is False


@pytest.mark.parametrize(("size", "sent"), [(MAX_FOUND_BYTES, True), (MAX_FOUND_BYTES + 1, False)])
async def test_a_long_row_is_found_but_not_sent_along(world, size, sent):
    empty = len(json.dumps(row("", "Yes.")))
    line = json.dumps(row("x" * (size - empty), "Yes.")).encode()
    dataset = await world.ready(line + b"\n" + GOOD)
    await world.prepare()
    found = await world.preparation().find_line("acme", dataset.id, 1)
    assert found.places[0].first_lines == (1,)
    assert found.row == (line if sent else b"")
