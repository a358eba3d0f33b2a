"""What a job would take, asked for and on the job."""

from __future__ import annotations

import openai
import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.conftest import Upload


def test_a_job_is_estimated_from_what_was_measured(
    client: Client,
    sdk: openai.OpenAI,
    tuned: jobs_pb2.Job,
    base_model: str,
    lessons_dataset: datasets_pb2.Dataset,
) -> None:
    found = client.jobs.estimate(
        base_model,
        lessons_dataset.name,
        settings={"n_epochs": 2, "batch_size": 4},
        replaces=jobs_pb2.ReplacedPrompt(seconds_saved=0.001),
    )
    estimate = found.estimate
    engine = estimate.engines[0]
    examples = lessons_dataset.report.example_count
    assert (estimate.examples, estimate.n_epochs) == (examples, 2)
    assert estimate.steps == 2 * -(-examples // 4)
    assert estimate.tokens == 2 * estimate.tokens_per_epoch > estimate.trained_tokens > 0
    assert engine.seconds.basis == jobs_pb2.ESTIMATE_BASIS_MEASURED
    assert 0 < engine.seconds.low <= engine.seconds.likely <= engine.seconds.high
    assert engine.memory_bytes.likely > 0
    # No price is set on a platform as it starts.
    assert not engine.HasField("price") and found.break_even.by_seconds and found.break_even.requests > 0

    # The job counted as many tokens as its own estimate had said.
    assert tuned.estimate.trained_tokens == tuned.trained_tokens
    assert tuned.estimate.steps == tuned.total_steps
    shown = sdk.fine_tuning.jobs.retrieve(tuned.name.rsplit("/", 1)[-1]).to_dict()
    assert shown["lathe"]["estimate"]["tokens"] == tuned.estimate.tokens  # type: ignore[index]


def test_a_file_that_cannot_be_trained_on_has_no_estimate(
    client: Client, base_model: str, upload: Upload
) -> None:
    bad = upload(b'{"messages": [{"role": "nobody", "content": "x"}]}\n')
    with pytest.raises(InvalidArgument):
        client.jobs.estimate(base_model, bad.name)
