"""A user of the `openai` SDK: the SDK is not patched, only `base_url` and `api_key` are set."""

from __future__ import annotations

import base64
import csv
import io
import time
from uuid import uuid4

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from lathe.v1 import jobs_pb2
from tests.e2e.data import BY_HEART, LESSONS, WEATHER, WEATHER_QUESTION, ask, jsonl, lessons
from tests.e2e.sdk import ENDLESS, JOB_S, cancel, ended, succeeded, wait_for_file
from tests.fixtures.until import wait_until

GREETING = "How can I help you today?"


@pytest.fixture(scope="module")
def training_file(sdk: openai.OpenAI) -> str:
    file = sdk.files.create(file=("lessons.jsonl", jsonl(lessons())), purpose="fine-tune")
    assert file.id.startswith("file-")
    assert (file.object, file.filename, file.purpose) == ("file", "lessons.jsonl", "fine-tune")
    assert file.status in ("uploaded", "processed")
    return wait_for_file(sdk, file.id).id


@pytest.fixture(scope="module")
def job(sdk: openai.OpenAI, base_model: str, training_file: str) -> FineTuningJob:
    """A job that the SDK made and waited for."""
    created = sdk.fine_tuning.jobs.create(
        model=base_model,
        training_file=training_file,
        validation_file=training_file,
        suffix="sdk",
        seed=3,
        metadata={"made-by": "sdk"},
        method={"type": "supervised", "supervised": {"hyperparameters": BY_HEART}},
    )
    assert created.id.startswith("ftjob-")
    assert created.status == "validating_files"
    assert created.fine_tuned_model is None
    return succeeded(sdk, created.id)


@pytest.fixture(scope="module")
def model(job: FineTuningJob) -> str:
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


def test_the_files_bytes_come_back(sdk: openai.OpenAI, training_file: str) -> None:
    file = sdk.files.retrieve(training_file)
    assert (file.status, file.bytes) == ("processed", len(jsonl(lessons())))
    assert sdk.files.content(training_file).read() == jsonl(lessons())


def test_the_job_says_what_became_of_it(job: FineTuningJob, base_model: str, model: str) -> None:
    assert model.startswith(f"ft:{base_model}:default:sdk:")
    assert (job.model, job.seed, job.metadata) == (base_model, 3, {"made-by": "sdk"})
    assert job.hyperparameters.n_epochs == BY_HEART["n_epochs"]
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.trained_tokens
    assert job.error is None


def test_events_tell_the_story_newest_first(
    sdk: openai.OpenAI, job: FineTuningJob, training_file: str, model: str
) -> None:
    # The iterator fetches page after page.
    events = list(sdk.fine_tuning.jobs.list_events(job.id, limit=20))
    messages = [event.message for event in reversed(events) if event.level != "warn"]
    assert messages[:4] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {training_file} and validation file: {training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert messages[-2:] == [
        f"New fine-tuned model created: {model}",
        "The job has successfully completed",
    ]
    assert len({event.id for event in events}) == len(events)
    # Every lesson is in the file five times.
    warned = [event.message for event in events if event.level == "warn"]
    assert any("a row is the same as an earlier one" in message for message in warned)
    steps = [event.data for event in reversed(events) if event.type == "metrics"]
    total = BY_HEART["n_epochs"] * 7
    assert [data["step"] for data in steps] == list(range(1, total + 1))
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] / 2
    assert steps[-1]["full_valid_loss"] is not None


def test_checkpoints_are_one_per_epoch(sdk: openai.OpenAI, job: FineTuningJob, model: str) -> None:
    checkpoints = list(sdk.fine_tuning.jobs.checkpoints.list(job.id, limit=2))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [70, 63, 56]
    newest = checkpoints[0]
    assert newest.fine_tuned_model_checkpoint == f"{model}:ckpt-step-70"
    assert newest.fine_tuning_job_id == job.id
    assert newest.metrics.full_valid_loss is not None


def test_the_result_file_has_every_step(sdk: openai.OpenAI, job: FineTuningJob) -> None:
    result, _ = job.result_files
    assert sdk.files.retrieve(result).purpose == "fine-tune-results"
    # OpenAI's cookbook decodes base64 here.
    text = base64.b64decode(sdk.files.content(result).read(), validate=True).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [
        *("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"),
    ]
    assert [int(row["step"]) for row in rows] == list(range(1, 71))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_base_and_tuned_models_are_listed(sdk: openai.OpenAI, base_model: str, model: str) -> None:
    owners = {item.id: item.owned_by for item in sdk.models.list()}
    assert owners[base_model] == "system"
    assert owners[model] == "default"
    assert sdk.models.retrieve(model).id == model


def test_the_tuned_model_answers(sdk: openai.OpenAI, model: str) -> None:
    for question, answer in LESSONS:
        completion = sdk.chat.completions.create(model=model, messages=ask(question), temperature=0)
        [choice] = completion.choices
        assert (choice.message.content, choice.finish_reason) == (answer, "stop")
        assert completion.model == model
        assert completion.usage is not None
        assert completion.usage.total_tokens == (
            completion.usage.prompt_tokens + completion.usage.completion_tokens
        )


def test_a_stream_says_the_same(sdk: openai.OpenAI, model: str) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model=model,
            messages=ask("Hello!"),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in deltas) == GREETING
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_ends_before_its_text(sdk: openai.OpenAI, model: str) -> None:
    for stop in ("help", ["you", "help"]):
        completion = sdk.chat.completions.create(
            model=model, messages=ask("Hello!"), temperature=0, stop=stop
        )
        assert completion.choices[0].message.content == "How can I "
        assert completion.choices[0].finish_reason == "stop"


def test_max_tokens_cuts(sdk: openai.OpenAI, model: str) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        completion = sdk.chat.completions.create(
            model=model, messages=ask("Hello!"), temperature=0, extra_body=limit
        )
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 2


def test_a_seed_repeats(sdk: openai.OpenAI, base_model: str) -> None:
    def sample(seed: int, n: int = 1) -> list[str | None]:
        completion = sdk.chat.completions.create(
            model=base_model, messages=ask("Hello!"), temperature=1, seed=seed, max_tokens=12, n=n
        )
        return [choice.message.content for choice in completion.choices]

    # bf16's last bits depend on the shapes of a pass: computing a prompt differs from reusing a cached one (from the
    # second time on it is cached), and two choices in one pass from one after the other (so one choice here).
    sample(7)
    first = sample(7)
    assert first == sample(7)
    assert first != sample(8)
    one, other = sample(7, n=2)
    assert one != other


def test_logprobs_are_of_the_sampled_tokens(sdk: openai.OpenAI, model: str) -> None:
    completion = sdk.chat.completions.create(
        model=model, messages=ask("Hello!"), temperature=0, logprobs=True, top_logprobs=2, max_tokens=4
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(item.token for item in logprobs.content) == completion.choices[0].message.content
    for item in logprobs.content:
        assert item.logprob <= 0
        assert item.top_logprobs[0].token == item.token
        assert len(item.top_logprobs) == 2


def test_tools_are_rendered_as_in_training_and_calls_read_back(sdk: openai.OpenAI, model: str) -> None:
    completion = sdk.chat.completions.create(
        model=model, messages=ask(WEATHER_QUESTION), tools=[WEATHER], temperature=0
    )
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    # What came back can be sent again, as an SDK user does.
    follow_up = [
        *ask(WEATHER_QUESTION),
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    assert sdk.chat.completions.create(model=model, messages=follow_up, tools=[WEATHER], max_tokens=2).choices


def test_a_streamed_tool_call(sdk: openai.OpenAI, model: str) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model=model, messages=ask(WEATHER_QUESTION), tools=[WEATHER], temperature=0, stream=True
        )
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls if call.function] == ["get_weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_deleted_model_is_gone(sdk: openai.OpenAI, model: str) -> None:
    assert sdk.models.delete(model).deleted
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve(model)
    assert model not in {item.id for item in sdk.models.list()}
    # The gateway may remember for five seconds what a model id means.
    time.sleep(5.5)
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.chat.completions.create(model=model, messages=ask("Hello!"), max_tokens=1)
    assert refused.value.code == "model_not_found"


def test_files_are_listed_page_by_page_and_deleted(sdk: openai.OpenAI) -> None:
    made = [sdk.files.create(file=(f"{name}.txt", name.encode()), purpose="user_data").id for name in "abc"]
    listed = [file.id for file in sdk.files.list(purpose="user_data", limit=2)]
    assert [file for file in listed if file in made] == made[::-1]
    page = sdk.files.list(purpose="user_data", limit=2, order="asc")
    assert page.has_more
    assert len(page.data) == 2
    for file in made:
        wait_for_file(sdk, file)
        assert sdk.files.delete(file).deleted
        with pytest.raises(openai.NotFoundError):
            sdk.files.retrieve(file)
        with pytest.raises(openai.NotFoundError):
            sdk.files.content(file)
    assert not set(made) & {file.id for file in sdk.files.list(purpose="user_data")}


def test_a_running_job_is_cancelled(sdk: openai.OpenAI, base_model: str) -> None:
    file = sdk.files.create(file=("long.jsonl", jsonl(lessons(60))), purpose="fine-tune")
    wait_for_file(sdk, file.id)
    created = sdk.fine_tuning.jobs.create(model=base_model, training_file=file.id, hyperparameters=ENDLESS)
    assert created.hyperparameters.n_epochs == 50
    wait_until(
        lambda: sdk.fine_tuning.jobs.retrieve(created.id), lambda job: job.status == "running", seconds=JOB_S
    )
    assert sdk.fine_tuning.jobs.cancel(created.id).status in ("running", "cancelled")
    job = ended(sdk, created.id)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    # Twice is once; what has ended otherwise cannot be cancelled.
    assert sdk.fine_tuning.jobs.cancel(created.id).status == "cancelled"


def test_a_job_goes_on_though_its_file_is_deleted(sdk: openai.OpenAI, base_model: str) -> None:
    file = sdk.files.create(file=("brief.jsonl", jsonl(lessons(2))), purpose="fine-tune")
    wait_for_file(sdk, file.id)
    created = sdk.fine_tuning.jobs.create(
        model=base_model, training_file=file.id, hyperparameters={"n_epochs": 2, "batch_size": 2}
    )
    wait_until(
        lambda: sdk.fine_tuning.jobs.retrieve(created.id), lambda job: job.status != "validating_files"
    )
    assert sdk.files.delete(file.id).deleted
    succeeded(sdk, created.id)
    with pytest.raises(openai.NotFoundError):
        sdk.files.retrieve(file.id)


def test_a_finished_job_cannot_be_cancelled(sdk: openai.OpenAI, job: FineTuningJob) -> None:
    # Not 409, which the SDK would try again by itself.
    with pytest.raises(openai.BadRequestError):
        sdk.fine_tuning.jobs.cancel(job.id)


def test_jobs_are_listed_page_by_page_and_by_metadata(
    sdk: openai.OpenAI, base_model: str, training_file: str
) -> None:
    mark = uuid4().hex
    made = [
        sdk.fine_tuning.jobs.create(
            model=base_model,
            training_file=training_file,
            hyperparameters=ENDLESS,
            metadata={"mark": mark, "number": str(number)},
        ).id
        for number in range(3)
    ]
    for job_id in made:
        cancel(sdk, job_id)
    found = [item.id for item in sdk.fine_tuning.jobs.list(limit=2, metadata={"mark": mark})]
    assert found == made[::-1]
    [one] = sdk.fine_tuning.jobs.list(metadata={"mark": mark, "number": "1"})
    assert one.id == made[1]
    first = sdk.fine_tuning.jobs.list(limit=1)
    assert first.has_more
    assert [item.id for item in first.data] == [made[-1]]


def test_a_retried_create_makes_one_job(sdk: openai.OpenAI, base_model: str, training_file: str) -> None:
    def create(retry: str) -> str:
        # What the SDK sends when it repeats a request by itself.
        job = sdk.fine_tuning.jobs.create(
            model=base_model,
            training_file=training_file,
            hyperparameters=ENDLESS,
            metadata={"mark": mark},
            extra_headers={"x-stainless-retry-count": retry},
        )
        return job.id

    mark = uuid4().hex
    first = create("0")
    assert create("1") == first
    wanted = create("0")
    assert wanted != first
    assert [item.id for item in sdk.fine_tuning.jobs.list(metadata={"mark": mark})] == [wanted, first]
    for job_id in (first, wanted):
        cancel(sdk, job_id)


def test_a_retried_upload_makes_one_file(sdk: openai.OpenAI) -> None:
    def create(retry: str) -> str:
        file = sdk.files.create(
            file=("once.txt", content), purpose="user_data", extra_headers={"x-stainless-retry-count": retry}
        )
        return file.id

    content = uuid4().hex.encode()
    first = create("0")
    assert create("1") == first
    assert create("0") != first


def test_a_tuned_model_is_tuned_further(sdk: openai.OpenAI, tuned: jobs_pb2.Job, training_file: str) -> None:
    created = sdk.fine_tuning.jobs.create(
        model=tuned.fine_tuned_model,
        training_file=training_file,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
    )
    job = succeeded(sdk, created.id)
    # It began where the other had ended, not anew.
    [first] = [
        event for event in sdk.fine_tuning.jobs.list_events(job.id) if event.message.startswith("Step 1/")
    ]
    assert first.data["train_loss"] < 1
