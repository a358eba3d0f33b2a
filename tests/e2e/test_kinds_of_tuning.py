"""DoRA with dropout on embeddings and head, and every weight of the model: tuned, kept and served like any other."""

from __future__ import annotations

from typing import Any

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import BY_HEART, LESSONS, ask

KINDS: dict[str, dict[str, Any]] = {
    "dora": {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        "settings": {"use_dora": True, "lora_dropout": 0.05},
    },
    "full": {"settings": {"full_parameter": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_lessons_and_answers(
    client: Client, base_model: str, lessons_dataset: datasets_pb2.Dataset, kind: str
) -> None:
    job = client.jobs.create(
        base_model, lessons_dataset.name, suffix=kind, seed=1, **{**BY_HEART, **KINDS[kind]}
    )
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    for question, expected in LESSONS:
        completion = client.chat(job.fine_tuned_model, ask(question), temperature=0, max_tokens=30)
        assert completion.choices[0].message.content == expected
