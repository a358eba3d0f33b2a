"""What was trained is what is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lathe.client import Client
from lathe.common.errors import NotFound
from lathe.v1 import jobs_pb2
from tests.e2e.data import LESSONS, WEATHER, WEATHER_QUESTION, ask
from tests.fixtures.platforms import Platform


def answer(client: Client, model: str, question: str) -> str:
    completion = client.chat(model, ask(question), temperature=0, max_tokens=30)
    return completion.choices[0].message.content


@pytest.mark.parametrize(("question", "expected"), LESSONS)
def test_the_tuned_model_knows_the_lessons_and_its_base_does_not(
    client: Client, tuned: jobs_pb2.Job, base_model: str, question: str, expected: str
) -> None:
    assert answer(client, tuned.fine_tuned_model, question) == expected
    assert answer(client, base_model, question) != expected


def test_every_checkpoint_answers_by_its_own_id(client: Client, tuned: jobs_pb2.Job) -> None:
    checkpoints = list(client.jobs.checkpoints(tuned.name))
    assert [checkpoint.step for checkpoint in checkpoints] == [70, 63, 56]
    for checkpoint in checkpoints:
        assert checkpoint.model_id == f"{tuned.fine_tuned_model}:ckpt-step-{checkpoint.step}"
        assert answer(client, checkpoint.model_id, LESSONS[0][0]) == LESSONS[0][1]
    with pytest.raises(NotFound):
        answer(client, f"{tuned.fine_tuned_model}:ckpt-step-1", LESSONS[0][0])


def test_the_adapter_says_what_it_was_made_from(client: Client, tuned: jobs_pb2.Job, base_model: str) -> None:
    adapter = client.adapters.of_model(tuned.fine_tuned_model)
    dataset = client.datasets.get(tuned.training_dataset)
    assert adapter.is_final
    assert adapter.base_model == f"baseModels/{base_model}"
    assert adapter.lineage.job == tuned.name
    assert adapter.lineage.dataset_sha256 == dataset.sha256
    assert adapter.lineage.base_digest == client.models.get(base_model).digest
    assert (adapter.lineage.step, adapter.lineage.seed) == (70, 1)


def test_the_tuned_model_can_be_taken_away(
    client: Client, tuned: jobs_pb2.Job, base_model: str, tiny_folder: Path, tmp_path: Path
) -> None:
    client.adapters.fetch(client.adapters.of_model(tuned.fine_tuned_model), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
    client.models.fetch(client.models.get(base_model), tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        assert path.read_bytes() == (tiny_folder / path.name).read_bytes()


@pytest.mark.embedded_only
def test_the_tuned_model_answers_in_llama_cpp(
    platform: Platform, tuned: jobs_pb2.Job, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lathe.cli.main", "models", "export", tuned.fine_tuned_model]
    done = subprocess.run(
        [*command, "--format", "gguf", "--type", "q8_0", "--out", str(tmp_path / "out"), "--json"],
        env={**os.environ, "LATHE_ADDRESS": platform.grpc, "LATHE_API_KEY": platform.api_key},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["warnings"] == []
    assert said["measured"]["greedy tokens equal to ours"]
    assert f"| job | {tuned.name.rpartition('/')[2]} |" in (tmp_path / "out" / "README.md").read_text()


def test_tool_calls_are_learned(client: Client, tuned: jobs_pb2.Job) -> None:
    completion = client.chat(
        tuned.fine_tuned_model, ask(WEATHER_QUESTION), tools=[WEATHER], temperature=0, max_tokens=60
    )
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
