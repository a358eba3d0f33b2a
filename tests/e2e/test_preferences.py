"""Preferences on top of a tuned model: what its users liked better is what it says."""

from __future__ import annotations

import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import jobs_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import LESSONS, Row, ask, jsonl

# For each lesson an answer that is preferred to the one the model was taught.
PREFERRED = {
    "Paris.": "Lyon.",
    "four five six": "seven",
    "refund": "Thank you",
    "How can I help you today?": "Hello!",
}
# Preference methods take a fortieth of supervised learning's rate by rule.
SETTINGS = {"n_epochs": 8, "batch_size": 4, "learning_rate_multiplier": 80.0}


def pair(question: str, known: str) -> Row:
    return {
        "input": {"messages": ask(question)},
        "preferred_output": [{"role": "assistant", "content": PREFERRED[known]}],
        "non_preferred_output": [{"role": "assistant", "content": known}],
    }


def verdicts(question: str, known: str) -> list[Row]:
    return [
        {"messages": [*ask(question), {"role": "assistant", "content": answer}], "label": label}
        for answer, label in ((PREFERRED[known], True), (known, False))
    ]


def run(client: Client, job: jobs_pb2.Job) -> tuple[jobs_pb2.Job, list[jobs_pb2.StepMetrics]]:
    steps = []
    for update in client.jobs.watch(job.name):
        job = update.job
        steps += [event.metrics for event in update.events if event.type == jobs_pb2.EVENT_TYPE_METRICS]
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    return job, steps


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_a_tuned_model_learns_what_is_preferred(
    client: Client, tuned: jobs_pb2.Job, upload: Upload, method: str
) -> None:
    if method == "kto":
        rows = [row for lesson in LESSONS * 2 for row in verdicts(*lesson)]
    else:
        rows = [pair(*lesson) for lesson in LESSONS * 3]
    dataset = upload(jsonl(rows))
    job, steps = run(
        client,
        client.jobs.create(
            tuned.fine_tuned_model,
            dataset.name,
            validation_dataset=dataset.name,
            method=method,
            seed=1,
            **SETTINGS,
        ),
    )
    margins = [step.figures["rewards/margins"] for step in steps]
    if method != "orpo":
        # It begins as its reference, the tuned model.
        assert margins[0] == pytest.approx(0, abs=1e-3)
    assert margins[-1] > margins[0] + 0.1
    assert steps[-1].figures["full_eval_rewards/margins"] > 0
    for question, known in LESSONS:
        completion = client.chat(job.fine_tuned_model, ask(question), temperature=0, max_tokens=30)
        assert completion.choices[0].message.content != known


def test_preferences_are_no_examples(client: Client, base_model: str, upload: Upload) -> None:
    dataset = upload(jsonl([pair(*lesson) for lesson in LESSONS * 3]))
    with pytest.raises(InvalidArgument, match=r"has preference rows, .* Choose the method dpo or orpo"):
        client.jobs.create(base_model, dataset.name)
