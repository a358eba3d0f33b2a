"""A model of another family goes the whole way: its own modules are tuned, saved, loaded and served."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe.client import Client
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import BY_HEART, LESSONS, ask
from tests.fixtures.tiny_chat import write_tiny_chat

# Phi-2 is the one that has least in common with Llama.
PHI = {
    "architectures": ["PhiForCausalLM"], "model_type": "phi", "layer_norm_eps": 1e-5, "hidden_act": "gelu_new",
    "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.embedded_only
def test_a_phi_is_tuned_and_served(
    client: Client, lessons_dataset: datasets_pb2.Dataset, tmp_path: Path
) -> None:
    model = client.models.import_folder(write_tiny_chat(tmp_path, **PHI), "e2e-phi", license="Apache-2.0")
    assert (model.tunable, model.architecture) == (True, "PhiForCausalLM"), model.not_tunable_reason
    assert list(model.target_modules) == ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
    job = client.jobs.create("e2e-phi", lessons_dataset.name, seed=1, **BY_HEART)
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job
    for question, expected in LESSONS:
        completion = client.chat(job.fine_tuned_model, ask(question), temperature=0, max_tokens=30)
        assert completion.choices[0].message.content == expected
