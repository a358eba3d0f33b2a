"""A base model without a chat template: tuned on texts, and what has messages is refused in words."""

from __future__ import annotations

import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import BY_HEART, LESSONS, ask, jsonl
from tests.fixtures.tiny_chat import write_tiny_chat

PLAIN = "e2e-plain"
NO_TEMPLATE = "no chat template"


@pytest.fixture(scope="module")
def plain(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_tiny_chat(tmp_path_factory.mktemp("plain"), template=None)
    model = client.models.import_folder(folder, PLAIN, license="Apache-2.0")
    assert (model.tunable, model.chat_template) == (True, ""), model.not_tunable_reason
    return PLAIN


def test_it_is_tuned_on_texts_and_takes_no_messages(client: Client, plain: str, upload: Upload) -> None:
    rows = [{"prompt": question, "completion": f" {answer}"} for question, answer in LESSONS] * 5
    job = client.jobs.create(plain, upload(jsonl(rows)).name, seed=1, **BY_HEART)
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    metrics = [e.metrics for e in client.jobs.events(job.name) if e.type == jobs_pb2.EVENT_TYPE_METRICS]
    assert metrics[0].train_loss < metrics[-1].train_loss / 5  # newest first
    for model in (plain, job.fine_tuned_model):
        with pytest.raises(InvalidArgument, match=f"{model}.*{NO_TEMPLATE}"):
            client.chat(model, ask("Hello!"), max_tokens=4)


def test_rows_of_messages_are_refused(
    client: Client, plain: str, lessons_dataset: datasets_pb2.Dataset, upload: Upload
) -> None:
    with pytest.raises(InvalidArgument, match=f"{plain} has {NO_TEMPLATE}"):
        client.jobs.create(plain, lessons_dataset.name)
    # In this format a row may be texts, so that the audit has to see it.
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": [{"role": "assistant", "content": "Ho"}],
    }
    job = client.jobs.create(plain, upload(jsonl([row] * 10)).name)
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_FAILED
    assert "line 1" in job.error.message and NO_TEMPLATE in job.error.message
