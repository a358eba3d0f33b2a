"""Going on from a tuned model, and repeating a job from its receipt."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import httpx
import openai
import pytest

from lathe.client import Client
from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import LESSONS, ask
from tests.fixtures.platforms import Platform


def ended(client: Client, job: jobs_pb2.Job) -> jobs_pb2.Job:
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    return job


def losses(client: Client, job: jobs_pb2.Job) -> list[float]:
    """The training loss of every step."""
    events = list(client.jobs.events(job.name))[::-1]
    return [event.metrics.train_loss for event in events if event.type == jobs_pb2.EVENT_TYPE_METRICS]


@pytest.fixture(scope="module")
def stacked(client: Client, tuned: jobs_pb2.Job, lessons_dataset: datasets_pb2.Dataset) -> jobs_pb2.Job:
    """Supervised on top of supervised."""
    made = client.jobs.create(
        tuned.fine_tuned_model, lessons_dataset.name, suffix="stacked", seed=2, n_epochs=1, batch_size=4
    )
    return ended(client, made)


def test_a_job_goes_on_from_the_adapter(client: Client, tuned: jobs_pb2.Job, stacked: jobs_pb2.Job) -> None:
    assert stacked.parent_model == tuned.fine_tuned_model == stacked.model
    first, then = losses(client, tuned), losses(client, stacked)
    assert then[0] < first[0] / 5
    question, answer = LESSONS[0]
    said = client.chat(stacked.fine_tuned_model, ask(question), max_tokens=8, temperature=0.0)
    assert said.choices[0].message.content == answer
    assert stacked.method.supervised.lora == tuned.method.supervised.lora


def test_the_adapter_names_its_parent(client: Client, tuned: jobs_pb2.Job, stacked: jobs_pb2.Job) -> None:
    lineage = client.adapters.of_model(stacked.fine_tuned_model).lineage
    parent = client.adapters.of_model(tuned.fine_tuned_model)
    assert (lineage.method, lineage.parent_model_id) == ("supervised", tuned.fine_tuned_model)
    assert lineage.parent_manifest_sha256 == parent.object.manifest_sha256


def test_a_checkpoint_can_be_gone_on_from(
    client: Client, tuned: jobs_pb2.Job, lessons_dataset: datasets_pb2.Dataset
) -> None:
    checkpoint = next(iter(client.jobs.checkpoints(tuned.name)))
    job = client.jobs.create(checkpoint.model_id, lessons_dataset.name, n_epochs=1, batch_size=25)
    assert ended(client, job).parent_model == checkpoint.model_id


def test_another_shape_than_the_adapters_is_refused(
    sdk: openai.OpenAI, tuned: jobs_pb2.Job, lessons_dataset: datasets_pb2.Dataset
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.fine_tuning.jobs.create(
            model=tuned.fine_tuned_model,
            training_file=lessons_dataset.name.rsplit("/", 1)[-1],
            extra_body={"method": {"type": "supervised", "supervised": {"lora": {"r": 4}}}},
        )
    assert caught.value.param == "method.supervised.lora.r"
    assert "as in the adapter to start from" in caught.value.message


def test_chat_rows_are_refused_for_preferences(
    client: Client, sdk: openai.OpenAI, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    with pytest.raises(InvalidArgument, match="has chat rows, and kto trains on unpaired preference rows"):
        client.jobs.create(base_model, lessons_dataset.name, method="kto")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.fine_tuning.jobs.create(
            model=base_model,
            training_file=lessons_dataset.name.rsplit("/", 1)[-1],
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        )
    assert (caught.value.param, caught.value.code) == ("training_file", "wrong_format")


def test_a_job_that_goes_on_has_no_receipt_yet(
    client: Client, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    job = client.jobs.create(base_model, lessons_dataset.name, n_epochs=50, batch_size=1)
    with pytest.raises(FailedPrecondition, match="receipt"):
        client.jobs.receipt(job.name)
    client.jobs.cancel(job.name)
    # The next test compares bits: nothing may share its passes.
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_CANCELLED


def test_a_rerun_gives_the_same_bits(
    client: Client, platform: Platform, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    settings = {"schedule": "linear", "lora_dropout": 0.1, "eval_every": 2}
    first = client.jobs.create(
        base_model,
        lessons_dataset.name,
        validation_dataset=lessons_dataset.name,
        n_epochs=1,
        batch_size=5,
        settings=settings,
    )
    first = ended(client, first)
    receipt = json.loads(client.jobs.receipt(first.name))
    assert receipt["hyperparameters"]["schedule"] == "linear"
    assert receipt["training_file"]["sha256"] == lessons_dataset.sha256
    assert receipt["engine"]["versions"]["torch"] and receipt["adapter"]["weights_sha256"]
    kept = b"".join(client.datasets.download(first.result_files[1]))
    assert json.loads(kept) == receipt
    again = ended(client, client.jobs.rerun(first.name))
    assert again.comparison.bit_identical, again.comparison
    assert (again.rerun_of, again.seed) == (first.name, first.seed)
    assert losses(client, again) == losses(client, first)
    id_ = again.name.rsplit("/", 1)[-1]
    key = {"authorization": f"Bearer {platform.api_key}"}
    answer = httpx.get(f"{platform.http}/v1/fine_tuning/jobs/{id_}/receipt", headers=key)
    assert answer.json()["adapter"]["weights_sha256"] == receipt["adapter"]["weights_sha256"]
    assert answer.json()["comparison"]["bit_identical"] is True
    shown = lathe(platform, "jobs", "show", id_)
    assert "bit-identical to the first's" in shown and first.name.rsplit("/", 1)[-1] in shown
    assert json.loads(lathe(platform, "jobs", "receipt", id_)) == answer.json()


def lathe(platform: Platform, *arguments: str) -> str:
    """What the command prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LATHE_")}
    place = {"LATHE_ADDRESS": platform.grpc, "LATHE_API_KEY": platform.api_key}
    command = [sys.executable, "-m", "lathe.cli.main", *arguments]
    done = subprocess.run(
        command, env=inherited | place, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
