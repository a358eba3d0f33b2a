"""Training files as people have them: CSV, Parquet, Alpaca, ShareGPT; uploaded by each client, and trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.fixtures.platforms import Platform

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
READY, ERROR = datasets_pb2.DATASET_STATE_READY, datasets_pb2.DATASET_STATE_ERROR


def content(client: Client, dataset: datasets_pb2.Dataset) -> list[dict[str, object]]:
    return [json.loads(line) for line in b"".join(client.datasets.download(dataset.name)).splitlines()]


def test_files_of_every_kind_are_trained_on(client: Client, base_model: str) -> None:
    kinds = {
        "questions.csv": ("chat", "question_answer"),
        "chat.parquet": ("chat", "openai"),
        "alpaca.json": ("chat", "alpaca"),
        "alpaca.jsonl": ("chat", "alpaca"),
        "sharegpt.jsonl": ("chat", "sharegpt"),
        "slim_orca.jsonl": ("chat", "sharegpt"),
        "ultrachat.parquet": ("chat", "openai"),
    }
    made = {}
    for name, kind in kinds.items():
        dataset = client.datasets.wait(client.datasets.upload(FORMATS / name).name)
        assert dataset.state == READY, dataset.report
        assert (dataset.report.format, dataset.report.layout) == kind
        assert len(content(client, dataset)) == dataset.report.example_count == 12
        made[name] = dataset.name
    for trained, validated in (("questions.csv", "sharegpt.jsonl"), ("chat.parquet", "alpaca.json")):
        options = {"validation_dataset": made[validated], "n_epochs": 1, "batch_size": 12}
        job = client.jobs.create(base_model, made[trained], **options)
        for update in client.jobs.watch(job.name):
            job = update.job
        assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job


def test_a_table_is_mapped_and_says_what_it_was(client: Client) -> None:
    path = FORMATS / "autotrain_preference.csv"
    columns = {"prompt_text_column": "prompt", "text_column": "good", "rejected_text_column": "bad"}
    dataset = client.datasets.wait(client.datasets.upload(path, columns=columns).name)
    assert (dataset.state, dataset.report.format) == (READY, "preference")
    assert (dataset.source_size_bytes, dataset.import_options.file_type) == (path.stat().st_size, "csv")
    assert content(client, dataset)[0].keys() == {"prompt", "chosen", "rejected"}
    missing = client.datasets.wait(client.datasets.upload(path, columns={"text": "Text"}).name)
    assert [(found.code, found.line) for found in missing.report.findings] == [("missing_column", 0)]
    with pytest.raises(InvalidArgument, match="promt"):
        client.datasets.upload(path, columns={"promt": "prompt"})
    with pytest.raises(InvalidArgument, match="file_type"):
        client.datasets.upload(path, file_type="xlsx")


def test_openais_client_uploads_them_too(sdk: openai.OpenAI) -> None:
    for name in ("chat.parquet", "alpaca.csv"):
        made = sdk.files.create(file=FORMATS / name, purpose="fine-tune")
        assert sdk.files.wait_for_processing(made.id, poll_interval=0.1).status == "processed"
        lines = sdk.files.content(made.id).text.splitlines()
        assert len(lines) == 12 and all(isinstance(json.loads(line), dict) for line in lines)


def test_openais_client_maps_columns(sdk: openai.OpenAI) -> None:
    columns = {"prompt_text_column": "prompt", "text_column": "good", "rejected_text_column": "bad"}
    content = (FORMATS / "autotrain_preference.csv").read_bytes()
    made = sdk.files.create(
        file=("table.txt", content), purpose="fine-tune", extra_body={"columns": columns, "file_type": "csv"}
    )
    assert sdk.files.wait_for_processing(made.id, poll_interval=0.1).status == "processed"
    assert json.loads(sdk.files.content(made.id).text.splitlines()[0]).keys() == {
        "prompt",
        "chosen",
        "rejected",
    }
    upload = sdk.uploads.create(
        bytes=len(content),
        filename="table.csv",
        mime_type="text/csv",
        purpose="fine-tune",
        extra_body={"columns": columns},
    )
    part = sdk.uploads.parts.create(upload.id, data=content)
    done = sdk.uploads.complete(upload.id, part_ids=[part.id])
    assert done.file is not None
    assert sdk.files.content(sdk.files.wait_for_processing(done.file.id, poll_interval=0.1).id).text
    for wrong, param in (
        ({"columns": {"promt": "x"}}, "columns[promt]"),
        ({"file_type": "xlsx"}, "file_type"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.files.create(file=("a.csv", b"a,b"), purpose="fine-tune", extra_body=wrong)
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.files.create(file=("a.csv", b"a"), purpose="evals", extra_body={"file_type": "csv"})
    assert refused.value.param == "file_type"


def test_what_no_method_trains_on_is_stored_and_a_job_says_so(client: Client, base_model: str) -> None:
    dataset = client.datasets.wait(client.datasets.upload(FORMATS / "triplets.jsonl").name)
    assert (dataset.state, dataset.report.format) == (READY, "triplet")
    with pytest.raises(InvalidArgument, match=r"has triplet rows, .* No method trains on those yet"):
        client.jobs.create(base_model, dataset.name)


def test_the_command_line(platform: Platform, client: Client) -> None:
    def lathe(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = {"LATHE_ADDRESS": platform.grpc, "LATHE_API_KEY": platform.api_key}
        return subprocess.run(
            [sys.executable, "-m", "lathe.cli.main", "datasets", *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    made = lathe(
        "upload",
        str(FORMATS / "questions.csv"),
        "--column",
        "prompt=Question",
        "--column",
        "completion=Answer",
    )
    assert made.returncode == 0, made.stderr
    shown = lathe("show", made.stdout.strip())
    assert "completion" in shown.stdout and "csv (completion=Answer, prompt=Question)" in shown.stdout
    assert client.datasets.get(made.stdout.strip()).state == READY
    wrong = lathe("upload", str(FORMATS / "questions.csv"), "--column", "prompt")
    assert wrong.returncode == 2 and "KEY=COLUMN" in wrong.stderr
    packed = lathe("upload", str(FORMATS / "chat.parquet"), "--file-type", "jsonl")
    assert packed.returncode != 0 and "is Parquet" in packed.stderr
