"""One engine trains and serves at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lathe.client import Client
from lathe.v1 import jobs_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import ask, jsonl, lessons

TOKENS = 400


@pytest.fixture
def long_job(client: Client, base_model: str, upload: Upload) -> Iterator[jobs_pb2.Job]:
    """A job of thousands of steps that has begun; cancelled in the end."""
    dataset = upload(jsonl(lessons(60)))
    job = client.jobs.create(base_model, dataset.name, n_epochs=50, batch_size=4)
    for update in client.jobs.watch(job.name):
        job = update.job
        if job.step >= 3:
            break
    yield job
    client.jobs.cancel(job.name)
    for _ in client.jobs.watch(job.name):
        pass


def test_a_stream_and_a_job_both_make_progress(
    client: Client, base_model: str, long_job: jobs_pb2.Job
) -> None:
    before, pieces = 0, 0
    # Tokens that end a turn are made unlikely, so that the answer has its full length.
    stream = client.chat_stream(
        base_model, ask("Hello!"), max_tokens=TOKENS, seed=1, logit_bias={0: -100, 1: -100, 2: -100}
    )
    with contextlib.closing(stream):
        for last in stream:
            if not pieces:
                before = client.jobs.get(long_job.name).step
            pieces += any(choice.delta.content for choice in last.choices)
    # Tokens that wait for a reader come in one piece; no more of them wait than the engine's queue of 256 holds.
    assert pieces > 1
    assert last.usage.completion_tokens == TOKENS
    job = client.jobs.get(long_job.name)
    assert job.state == jobs_pb2.JOB_STATE_RUNNING
    assert before < job.step
    # Nobody had to make room: it is the attempt that began.
    assert (job.attempt_count, job.lost_lease_count) == (1, 0)
