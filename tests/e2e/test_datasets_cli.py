"""`lathe datasets` and `lathe lineage` as one types them: what is printed, and how the command ends."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from lathe.client import Client
from lathe.client.names import last_id
from lathe.common.errors import NotFound
from lathe.v1 import jobs_pb2
from tests.e2e.data import jsonl, row
from tests.fixtures.cli import INVALID, Lathe
from tests.fixtures.platforms import Platform

LONG = {"messages": [turn for n in range(30) for turn in row(f"Is {n} even?", "Count it.")["messages"][1:]]}
ROWS = [*(row(f"What comes after {n}?", f"{n + 1}, I would say.") for n in range(24)), LONG]


def made(lathe: Lathe, *arguments: str) -> list[str]:
    """The ids of the datasets that a command makes: all it prints to stdout."""
    return lathe.said("datasets", *arguments).stdout.split()


@pytest.fixture(scope="module")
def lathe(platform: Platform) -> Lathe:
    return Lathe(platform)


@pytest.fixture(scope="module")
def dataset(lathe: Lathe, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("cli") / "train.jsonl"
    file.write_bytes(jsonl(ROWS))
    (uploaded,) = made(lathe, "upload", str(file))
    return uploaded


def test_rows_go_where_the_command_says(lathe: Lathe, client: Client, dataset: str) -> None:
    train, held_out = made(lathe, "split", dataset, "--count", "10", "--by", "answer", "--seed", "3")
    assert f"split of {dataset} (held_out)" in lathe.said("datasets", "show", held_out).output
    (dropped,) = made(lathe, "drop", dataset, "--lines", "1,3-5")
    (deduped,) = made(lathe, "dedupe", dataset)
    counts = [client.datasets.get(each).report.example_count for each in (train, held_out, dropped, deduped)]
    assert counts == [15, 10, 21, 25]
    sampled = lathe.said("datasets", "sample", dataset, "--count", "12", "--dry-run")
    assert "the dataset: 12 of 25" in sampled.output
    assert f"only in {dataset}" in lathe.said("datasets", "diff", dataset, dropped).stdout
    assert int(lathe.json("datasets", "diff", dataset, dropped)["only_in_first"]["count"]) == 4


def test_rows_are_shortened_or_dropped_for_a_model(lathe: Lathe, dataset: str, base_model: str) -> None:
    limit = ("--model", base_model, "--limit", "128")
    counted = lathe.said("datasets", "truncate", dataset, *limit, "--dry-run").output
    assert "the dataset: 25 of 25 rows, 1 made shorter" in counted
    (truncated,) = made(lathe, "truncate", dataset, *limit, "--policy", "cut_end")
    assert int(lathe.json("datasets", "diff", dataset, truncated)["in_both"]["count"]) == 24
    findings = ("--finding", "truncated", "--finding", "tail_cut", "--model", base_model)
    found = lathe.said("datasets", "drop", dataset, *findings, "--context-limit", "128", "--dry-run")
    assert "the dataset: 24 of 25 rows" in found.output
    refused = lathe.run("datasets", "drop", dataset, "--lines", "99")
    assert refused.exit_code == INVALID
    assert "no row on line 99" in refused.output


def test_an_audit_and_a_preview_show_what_the_model_will_see(
    lathe: Lathe, dataset: str, base_model: str
) -> None:
    audit = lathe.said("datasets", "audit", dataset, "--model", base_model, "--context-limit", "128")
    assert "cut at the limit of 128" in audit.output
    refused = lathe.run("datasets", "audit", dataset, "--model", base_model, "--method", "dpo")
    assert refused.exit_code == INVALID
    preview = lathe.said("datasets", "preview", dataset, "--model", base_model, "--line", "2")
    assert "2, I would say." in preview.output.replace("⟦", "").replace("⟧", "")


def test_a_held_out_set_is_frozen_and_thawed(lathe: Lathe, client: Client, dataset: str) -> None:
    (exam,) = made(lathe, "sample", dataset, "--count", "10", "--seed", "9")
    name = f"exam-{uuid4().hex[:8]}"
    try:
        assert f"frozen as {name}" in lathe.said("datasets", "freeze", exam, name).output
        assert client.datasets.get(exam).frozen_as == name
    finally:
        assert "no held-out set any more" in lathe.said("datasets", "thaw", exam).output
    assert not client.datasets.get(exam).frozen_as


def test_lineage_names_the_models_of_a_row_and_the_rows_of_a_model(
    lathe: Lathe, tuned: jobs_pb2.Job, tmp_path: Path
) -> None:
    model, trained_on = tuned.fine_tuned_model, last_id(tuned.training_dataset)
    assert trained_on in lathe.said("lineage", "model", model).output
    assert model in lathe.said("lineage", "row", trained_on, "1").output
    file = tmp_path / "mine.jsonl"
    file.write_bytes(jsonl([row("Who has never been asked?", "This.")]))
    assert model not in lathe.said("lineage", "row", str(file), "1").output
    assert isinstance(lathe.run("lineage", "model", "ft:none").exception, NotFound)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--model", "typo"), "The model 'typo' does not exist"),
        (("--n-epochs", "0"), "n_epochs is 0"),
        (("--suffix", "b@d"), "suffix must be"),
        (("--validation", "no/such.jsonl"), "There is no file no/such.jsonl"),
        (("--validation", "file-none"), "file-none was not found"),
    ],
)
def test_a_file_is_uploaded_once_all_else_of_its_job_is_right(
    lathe: Lathe, base_model: str, tmp_path: Path, wrong: tuple[str, str], words: str
) -> None:
    file = tmp_path / f"{uuid4().hex}.jsonl"
    file.write_bytes(jsonl(ROWS))
    refused = lathe.run("jobs", "create", "--train", str(file), "--model", base_model, *wrong)
    assert words in str(refused.exception)
    if wrong[0] == "--model":
        assert words in str(lathe.run("datasets", "check", str(file), *wrong).exception)
    assert file.name not in lathe.said("datasets", "list", "--json").output


def test_a_job_on_paths_is_estimated(lathe: Lathe, client: Client, base_model: str, tmp_path: Path) -> None:
    file = tmp_path / f"{uuid4().hex}.jsonl"
    file.write_bytes(jsonl(ROWS))
    paths = ("--train", str(file), "--validation", str(file))
    assert "of 25 examples" in lathe.said("jobs", "estimate", *paths, "--model", base_model).output
    assert file.name in {dataset.display_name for dataset in client.datasets.list()}
