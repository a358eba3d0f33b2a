"""Methods and options as the unmodified OpenAI SDK asks for them."""

from __future__ import annotations

import io
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.data import LESSONS, Row, ask, jsonl, lessons
from tests.e2e.sdk import ended, succeeded


def pairs() -> list[Row]:
    return [
        {
            "input": {"messages": ask(question)},
            "preferred_output": [{"role": "assistant", "content": "No."}],
            "non_preferred_output": [{"role": "assistant", "content": answer}],
        }
        for question, answer in LESSONS * 3
    ]


def uploaded(sdk: openai.OpenAI, rows: list[Row]) -> str:
    return sdk.files.create(file=("rows.jsonl", io.BytesIO(jsonl(rows))), purpose="fine-tune").id


def events(sdk: openai.OpenAI, job: FineTuningJob) -> list[Any]:
    """Oldest first."""
    return list(sdk.fine_tuning.jobs.list_events(job.id, limit=100))[::-1]


def test_dpo_on_top_of_a_tuned_model(sdk: openai.OpenAI, tuned: jobs_pb2.Job) -> None:
    file = uploaded(sdk, pairs())
    made = sdk.fine_tuning.jobs.create(
        model=tuned.fine_tuned_model,
        training_file=file,
        validation_file=file,
        seed=3,
        method={
            "type": "dpo",
            "dpo": {
                "hyperparameters": {
                    "beta": 0.2,
                    "n_epochs": 2,
                    "batch_size": 4,
                    "learning_rate_multiplier": 40.0,
                }
            },
        },
    )
    assert made.method is not None and made.method.dpo is not None
    job = succeeded(sdk, made.id)
    assert (
        job.method is not None and job.method.dpo is not None and job.method.dpo.hyperparameters is not None
    )
    assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.2)
    assert job.to_dict()["hyperparameters"] is None
    steps = [event.data for event in events(sdk, job) if event.type == "metrics"]
    # It begins as its reference: log 2, and no margin.
    assert steps[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert steps[-1]["full_valid_loss"] < 0.6931
    lathe = sdk.models.retrieve(str(job.fine_tuned_model)).to_dict()["lathe"]
    assert (lathe["method"], lathe["parent_model"]) == ("dpo", tuned.fine_tuned_model)


def test_a_preference_file_is_refused_for_supervised(sdk: openai.OpenAI, base_model: str) -> None:
    """At once when the file has been validated, otherwise by the job, with the same field."""
    file = uploaded(sdk, pairs())
    try:
        job = sdk.fine_tuning.jobs.create(model=base_model, training_file=file)
    except openai.BadRequestError as error:
        param, message = error.param, error.message
    else:
        job = ended(sdk, job.id)
        assert job.error is not None
        param, message = job.error.param, job.error.message
    assert param == "training_file" and "preference" in message


def test_reinforcement_is_refused(sdk: openai.OpenAI, base_model: str) -> None:
    file = uploaded(sdk, lessons())
    grader = {"type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "eq"}
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.fine_tuning.jobs.create(
            model=base_model,
            training_file=file,
            method={"type": "reinforcement", "reinforcement": {"grader": grader}},  # type: ignore[typeddict-item]
        )
    assert (caught.value.param, caught.value.code) == ("method.type", "unsupported_parameter")


def test_every_option_at_once(
    sdk: openai.OpenAI, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    file = lessons_dataset.name.rsplit("/", 1)[-1]
    made = sdk.fine_tuning.jobs.create(
        model=base_model,
        training_file=file,
        validation_file=file,
        extra_body={
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"n_epochs": 3, "batch_size": 5},
                    "lora": {
                        "r": 4,
                        "use_rslora": True,
                        "use_dora": True,
                        "lora_dropout": 0.1,
                        "target_modules": ["q_proj", "down_proj", "lm_head"],
                    },
                },
            },
            "training": {
                "schedule": "constant",
                "warmup_fraction": 0.2,
                "weight_decay": 0.01,
                "max_grad_norm": 0.5,
                "eval_every": 2,
                "keep_checkpoints": 1,
                "early_stopping_patience": 50,
                "sample_prompts": 2,
            },
        },
    )
    job = succeeded(sdk, made.id)
    shown = job.to_dict()
    assert shown["method"]["supervised"]["lora"]["lora_alpha"] == 4.0
    assert (shown["training"]["schedule"], shown["training"]["eval_every"]) == ("constant", 2)
    happened = events(sdk, job)
    rates = [event.data["learning_rate"] for event in happened if event.type == "metrics"]
    assert len(rates) == 15 and rates[-1] == max(rates) == rates[5]
    samples = [event for event in happened if event.type == "message" and event.data]
    assert {event.data["kind"] for event in samples} == {"generation"}
    # Two prompts at each of three checkpoints.
    assert len(samples) == 6 and all(event.data["prompt"] for event in samples)
    assert 1 <= len(list(sdk.fine_tuning.jobs.checkpoints.list(job.id))) <= 2
    said = sdk.chat.completions.create(
        model=str(job.fine_tuned_model),
        messages=ask(LESSONS[0][0]),
        max_tokens=4,  # type: ignore[arg-type]
    )
    assert said.choices[0].message.role == "assistant"


def test_all_weights_of_a_small_model(
    sdk: openai.OpenAI, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    file = lessons_dataset.name.rsplit("/", 1)[-1]
    training = {"full_parameter": True}
    made = sdk.fine_tuning.jobs.create(
        model=base_model,
        training_file=file,
        seed=1,
        hyperparameters={"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 10.0},
        extra_body={"training": training},
    )
    job = succeeded(sdk, made.id)
    question, answer = LESSONS[0]
    said = sdk.chat.completions.create(
        model=str(job.fine_tuned_model),
        messages=ask(question),  # type: ignore[arg-type]
        max_tokens=8,
        temperature=0.0,
    )
    assert said.choices[0].message.content == answer
