"""Datasets made from datasets, what they share, and held-out sets that no job trains on."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from lathe.client import Client
from lathe.client.rows import split_operation
from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import BY_HEART, jsonl, row

COLOURS = ("red", "green", "blue")
ROWS = [row(f"What colour has number {n}?", COLOURS[n % 3]) for n in range(60)]


@pytest.fixture(scope="module")
def colours(upload: Upload) -> datasets_pb2.Dataset:
    return upload(jsonl(ROWS))


def content(client: Client, dataset: datasets_pb2.Dataset) -> list[dict[str, object]]:
    return [json.loads(line) for line in b"".join(client.datasets.download(dataset.name)).splitlines()]


def test_rows_are_split_dropped_sampled_and_deduplicated(
    client: Client, upload: Upload, colours: datasets_pb2.Dataset
) -> None:
    counted = client.datasets.count(colours.name, split_operation(fraction=0.25, stratify_by="answer"))
    assert [(each.part, each.rows) for each in counted.prepared] == [("train", 45), ("held_out", 15)]
    made = client.datasets.split(colours.name, fraction=0.25, stratify_by="answer")
    train, held_out = (client.datasets.wait(each.name) for each in made)
    assert (train.report.example_count, held_out.report.example_count) == (45, 15)
    assert held_out.preparation.part == "held_out"
    assert held_out.preparation.parents[0].name == colours.name
    rows = content(client, train) + content(client, held_out)
    assert sorted(map(str, rows)) == sorted(map(str, ROWS))

    found = client.datasets.diff(colours.name, train.name)
    assert (found.only_in_first.count, found.only_in_second.count, found.in_both.count) == (15, 0, 45)

    twice = upload(jsonl([*ROWS[:12], *ROWS[3:9]]))
    deduped = client.datasets.wait(client.datasets.dedupe(twice.name).name)
    assert content(client, deduped) == ROWS[:12]
    dropped = client.datasets.wait(client.datasets.drop(twice.name, [1, 18]).name)
    assert content(client, dropped) == [*ROWS[1:12], *ROWS[3:8]]
    one, other = (client.datasets.wait(client.datasets.sample(colours.name, 20, seed=s).name) for s in (1, 1))
    assert one.sha256 == other.sha256 and one.report.example_count == 20
    with pytest.raises(InvalidArgument, match="count"):
        client.datasets.sample(colours.name, 0)
    with pytest.raises(InvalidArgument, match="9 rows would be held out"):
        client.datasets.split(colours.name, count=9)
    impossible = client.datasets.wait(client.datasets.drop(colours.name, [61]).name)
    assert impossible.report.findings[0].code == "cannot_prepare"


def test_rows_are_dropped_by_what_the_audit_found(client: Client, base_model: str, upload: Upload) -> None:
    private = row("Who wrote it?", "ada.lovelace@analytical.io wrote it")
    parent = upload(jsonl([*ROWS[:12], private]))
    made = client.datasets.wait(
        client.datasets.drop(parent.name, codes=["email"], base_model=base_model).name
    )
    assert content(client, made) == ROWS[:12]
    assert list(made.preparation.operation.drop.codes) == ["email"]


def test_a_row_is_found_wherever_it_is(client: Client, colours: datasets_pb2.Dataset, upload: Upload) -> None:
    spelled = json.dumps(ROWS[7], separators=(",", ":"), sort_keys=True)
    other = upload(jsonl(ROWS[:20]).replace(json.dumps(ROWS[7]).encode(), spelled.encode()))
    found = client.datasets.find(dataset=colours.name, line=8)
    places = {place.dataset.name: list(place.first_lines) for place in found.places}
    assert places[colours.name] == places[other.name] == [8]
    assert client.datasets.find(row=spelled).digest == client.datasets.find(digest=found.digest).digest
    assert not client.datasets.find(row=json.dumps(row("?", "never uploaded"))).places


def _check_lineage(
    client: Client, job: jobs_pb2.Job, train: datasets_pb2.Dataset, held_out: datasets_pb2.Dataset
) -> None:
    """The model knows its rows, and the rows know their models."""
    (training,) = client.lineage.of_model(job.fine_tuned_model).trainings
    assert training.job is not None and training.job.name == job.name
    assert train.name in {each.name for each in training.rows.datasets}
    assert training.rows.audit.rows == train.report.example_count

    def seen_by(dataset: datasets_pb2.Dataset) -> set[str]:
        return {each.model_id for each in client.lineage.of_row(dataset=dataset.name, line=1).models}

    assert job.fine_tuned_model in seen_by(train)
    assert job.fine_tuned_model not in seen_by(held_out)


def test_no_job_trains_on_a_held_out_row(
    client: Client, base_model: str, colours: datasets_pb2.Dataset
) -> None:
    made = client.datasets.split(colours.name, count=12, seed=5)
    train, held_out = (client.datasets.wait(each.name) for each in made)
    name = f"exam-{uuid4().hex[:8]}"
    assert client.datasets.freeze(held_out.name, name).frozen_as == name
    try:
        refused = client.jobs.create(base_model, colours.name, **BY_HEART)
        for update in client.jobs.watch(refused.name):
            refused = update.job
        assert refused.state == jobs_pb2.JOB_STATE_FAILED
        assert (refused.error.code, refused.error.param) == ("frozen_row", "training_file")
        assert name in refused.error.message and "12 row(s)" in refused.error.message

        job = client.jobs.create(
            base_model, train.name, validation_dataset=held_out.name, n_epochs=1, batch_size=16, seed=1
        )
        for update in client.jobs.watch(job.name):
            job = update.job
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
        _check_lineage(client, job, train, held_out)
        with pytest.raises(FailedPrecondition, match=name):
            client.datasets.delete(held_out.name)
    finally:
        # Other tests of this platform train on what they like.
        client.datasets.thaw(held_out.name)
    client.datasets.delete(held_out.name)
