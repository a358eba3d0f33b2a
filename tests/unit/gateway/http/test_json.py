from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument, LatheError, Unavailable, Unimplemented
from lathe.gateway.http.answers import DONE, Json, events
from lathe.gateway.http.chat_json import ChatBody, chat_request, chunks_json, completion_json
from lathe.gateway.http.files import base64_of
from lathe.gateway.http.files_json import disposition, file_json
from lathe.gateway.http.fine_tuning import metadata_filter
from lathe.gateway.http.fine_tuning_body import JobBody, job_fields, job_request
from lathe.gateway.http.fine_tuning_json import event_json, job_json
from lathe.gateway.http.requests import json_digest, list_body, parse_json, routing_path, validated
from lathe.gateway.model import (
    ChatChoice,
    ChatDelta,
    ChatHead,
    ChatResult,
    ChoiceDelta,
    FunctionToolCall,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from lathe.v1 import datasets_pb2, jobs_pb2

HEAD = ChatHead("chatcmpl-1", datetime(2026, 1, 1, tzinfo=UTC), "tiny", "fp_1")
CALL = FunctionToolCall("call_1", "f", "{}")
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
JOB: dict[str, Any] = {"model": "tiny", "training_file": "file-1"}


def chat(**fields: Any) -> Any:
    return chat_request(validated(ChatBody, {**ASK, **fields}))


def job(**fields: Any) -> jobs_pb2.CreateJobRequest:
    return job_request(validated(JobBody, {**JOB, **fields}), "acme", "r1")


def wrong(make: Any, **fields: Any) -> str:
    with pytest.raises((InvalidArgument, Unimplemented)) as caught:
        make(**fields)
    error: LatheError = caught.value
    return error.violations[0].field


# --- requests


def test_paths_keep_encoded_slashes_in_their_segment() -> None:
    assert routing_path(b"/v1/models/ft:a%2Fb%3A%25c") == "/v1/models/ft:a%2Fb:%25c"
    assert routing_path(b"/v1/files/a/content") == "/v1/files/a/content"


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert json_digest({"a": 1, "b": [1]}) == json_digest({"b": [1], "a": 1}) != json_digest({"a": 1})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "Expecting value"),
        (b"[]", "must be a JSON object"),
        (b"{", "Expecting property name"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"\xff", "can't decode byte 0xff"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number has too many digits"),
    ],
)
def test_what_is_no_json_object(body: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        parse_json(body)
    assert caught.value.reason == "INVALID_JSON"


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        validated(JobBody, {"training_file": 3, "hyperparameters": {"n_epoch": 1}})
    assert {item.field for item in caught.value.violations} == {
        "model",
        "training_file",
        "hyperparameters.n_epoch",
    }
    assert "Missing required parameter: 'model'." in str(caught.value)


def test_pages() -> None:
    assert list_body([], has_more=False)["first_id"] is None
    page = list_body([{"id": "a"}, {"id": "b"}], has_more=True)
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", "a", "b", True)


# --- chat


def test_chat_defaults_and_nulls() -> None:
    request = chat(temperature=None, stop=None, n=None, tools=None, logprobs=None, top_logprobs=None)
    assert request == chat()
    assert (request.temperature, request.top_p, request.n, request.max_tokens) == (1.0, 1.0, 1, None)


def test_chat_fields() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = chat(
        stop="x", tools=tools, tool_choice="auto", logit_bias={"5": -100}, max_completion_tokens=3, user="u"
    )
    assert (request.stop, request.logit_bias, request.max_tokens) == (("x",), {5: -100}, 3)
    assert request.tools == tuple(tools) and chat(tools=tools, tool_choice="none").tools == ()
    assert not chat(parallel_tool_calls=False).parallel_tool_calls
    assert (
        chat(response_format={"type": "text"}, store=True, metadata={"a": "b"}, service_tier="auto") == chat()
    )


def test_chat_refusals() -> None:
    assert wrong(chat, response_format={"type": "json_schema"}) == "response_format"
    assert wrong(chat, tools=[{}], tool_choice="required") == "tool_choice"
    assert wrong(chat, tool_choice="auto") == "tool_choice"
    assert wrong(chat, functions=[]) == "functions"
    assert wrong(chat, max_tokens=1, max_completion_tokens=1) == "max_tokens"
    assert wrong(chat, stream_options={"include_usage": True}) == "stream_options"
    assert wrong(chat, modalities=["audio"]) == "modalities"
    assert wrong(chat, n="1") == "n"
    assert wrong(chat, temperature=float("inf")) == "temperature"
    assert wrong(chat, web_search_options={}) == "web_search_options"
    assert wrong(chat, best_of=2) == "best_of"


def test_a_completion() -> None:
    logprob = TokenLogprob("é", "é".encode(), -0.5, (TopLogprob("e", b"e", -1.0),))
    result = ChatResult(
        HEAD,
        (ChatChoice(0, "é", (), "stop", (logprob,)), ChatChoice(1, None, (CALL,), "tool_calls")),
        Usage(5, 2, 3),
    )
    body = completion_json(result)
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "tiny", 1767225600)
    first, second = body["choices"]
    assert first["logprobs"]["content"][0]["bytes"] == [195, 169] and "tool_calls" not in first["message"]
    assert second["message"]["content"] is None and second["logprobs"] is None
    assert second["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert body["usage"]["total_tokens"] == 7
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


def test_chunks() -> None:
    first = chunks_json(ChatDelta(HEAD, ChoiceDelta(0, "assistant", "Hi")), include_usage=True)
    assert [chunk["choices"][0]["delta"] for chunk in first] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hi"},
    ]
    assert first[0]["usage"] is None
    (calls,) = chunks_json(ChatDelta(HEAD, ChoiceDelta(0, tool_calls=(CALL,))), include_usage=False)
    assert calls["choices"][0]["delta"]["tool_calls"][0]["index"] == 0 and "usage" not in calls
    (last,) = chunks_json(ChatDelta(HEAD, ChoiceDelta(0, finish_reason="stop")), include_usage=False)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    usage = ChatDelta(HEAD, None, Usage(1, 1, 0))
    assert chunks_json(usage, include_usage=False) == []
    (asked,) = chunks_json(usage, include_usage=True)
    assert asked["choices"] == [] and asked["usage"]["total_tokens"] == 2


@pytest.mark.parametrize("error", [Unavailable("lost", retry_after=1), RuntimeError("bug")])
async def test_an_error_in_a_stream_is_an_event(error: Exception) -> None:
    async def items() -> AsyncGenerator[Json, None]:
        yield {"text": "ü\n"}
        raise error

    sent = [chunk async for chunk in events(items())]
    assert sent[0] == 'data: {"text":"ü\\n"}\n\n'.encode() and sent[-1] == DONE
    body = json.loads(sent[1].removeprefix(b"data: "))
    assert body["error"]["type"] == "server_error" and "bug" not in body["error"]["message"]


# --- files


def test_a_file() -> None:
    dataset = datasets_pb2.Dataset(
        name="projects/acme/datasets/file-1",
        display_name="a.jsonl",
        purpose="fine-tune",
        state=datasets_pb2.DATASET_STATE_READY,
        size_bytes=3,
    )
    dataset.create_time.FromSeconds(5)
    body = file_json(dataset)
    assert (body["id"], body["status"], body["created_at"], body["expires_at"]) == (
        "file-1",
        "processed",
        5,
        None,
    )
    assert body["status_details"] is None and body["filename"] == "a.jsonl"
    dataset.state = datasets_pb2.DATASET_STATE_VALIDATING
    assert file_json(dataset)["status"] == "uploaded"


def test_file_names_in_headers() -> None:
    header = disposition('a"\r\n.ü')
    assert header == "attachment; filename=\"a___._\"; filename*=UTF-8''a%22%0D%0A.%C3%BC"


@given(st.lists(st.binary(max_size=10), max_size=8))
async def test_base64_of_any_pieces(pieces: list[bytes]) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    whole = b"".join([piece async for piece in base64_of(stream())])
    assert whole == base64.b64encode(b"".join(pieces))


# --- jobs


def test_a_job_request() -> None:
    request = job(validation_file="file-2", suffix="mine", seed=0, metadata={"a": "b"})
    assert (request.parent, request.request_id) == ("projects/acme", "r1")
    assert request.job.training_dataset == "projects/acme/datasets/file-1"
    assert request.job.validation_dataset == "projects/acme/datasets/file-2"
    assert request.job.HasField("seed") and request.job.seed == 0 and not job().job.HasField("seed")


def test_hyperparameters_of_both_kinds() -> None:
    numbers = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 1}
    old = job(hyperparameters=numbers)
    new = job(method={"type": "supervised", "supervised": {"hyperparameters": numbers, "lora": {"r": 4}}})
    for request in (old, new):
        given = request.job.method.supervised.hyperparameters
        assert (given.n_epochs, given.learning_rate_multiplier) == (2, 1.0)
        assert not given.HasField("batch_size")
    assert new.job.method.supervised.lora.r == 4
    assert job(hyperparameters={"n_epochs": "auto"}) == job() == job(integrations=[], suffix=None)
    both = {"type": "supervised", "supervised": {"hyperparameters": {}}}
    assert wrong(job, hyperparameters={}, method=both) == "hyperparameters"
    prefix = "job.method.supervised.hyperparameters"
    assert (prefix, "hyperparameters") in job_fields(validated(JobBody, {**JOB, "hyperparameters": {}}))
    assert (prefix, "method.supervised.hyperparameters") in job_fields(validated(JobBody, JOB))


def test_preference_methods() -> None:
    numbers = {"beta": 0.2, "n_epochs": "auto", "batch_size": 4}
    dpo = job(method={"type": "dpo", "dpo": {"hyperparameters": numbers}}).job.method.dpo
    assert (dpo.hyperparameters.beta, dpo.hyperparameters.batch_size) == (0.2, 4)
    assert not dpo.hyperparameters.HasField("n_epochs")
    assert job(method={"type": "dpo"}).job.method.WhichOneof("method") == "dpo"
    orpo = {"type": "orpo", "orpo": {"hyperparameters": {"beta": "auto"}, "lora": {"use_dora": True, "r": 4}}}
    given = job(method=orpo).job.method.orpo
    assert given.lora == jobs_pb2.LoraConfig(r=4, use_dora=True) and not given.hyperparameters.HasField(
        "beta"
    )
    kto = {"type": "kto", "kto": {"hyperparameters": {"desirable_weight": 1.5}}}
    assert job(method=kto).job.method.kto.hyperparameters.desirable_weight == 1.5
    options = job(training={"schedule": "linear", "eval_every": 5, "full_parameter": None}).job.training
    assert options == jobs_pb2.TrainingOptions(schedule="linear", eval_every=5)


@pytest.mark.parametrize("kind", ["supervised", "dpo", "orpo", "kto"])
def test_auto_is_the_same_as_absent_for_every_setting(kind: str) -> None:
    def made(numbers: object, lora: object, training: object) -> jobs_pb2.CreateJobRequest:
        chosen = {"hyperparameters": numbers, "lora": lora}
        return job(method={"type": kind, kind: chosen}, training=training)

    method = getattr(jobs_pb2.Method(), kind)
    settings = (method.hyperparameters, method.lora, jobs_pb2.TrainingOptions())
    names = [message.DESCRIPTOR.fields_by_name for message in settings]
    assert made(*(dict.fromkeys(fields, "auto") for fields in names)) == made({}, {}, {})
    assert wrong(job, training={"eval_every": "often"}) == "training.eval_every"


def test_preference_refusals() -> None:
    def dpo(**numbers: object) -> dict[str, object]:
        return {"type": "dpo", "dpo": {"hyperparameters": numbers}}

    assert wrong(job, method=dpo(beta=2.5)) == "method.dpo.hyperparameters.beta"
    assert wrong(job, method=dpo(loss_type="hinge")) == "method.dpo.hyperparameters.loss_type"
    assert wrong(job, method=dpo(desirable_weight=1.0)) == "method.dpo.hyperparameters.desirable_weight"
    assert wrong(job, method={"type": "dpo", "supervised": {}}) == "method.supervised"
    assert wrong(job, method={"type": "dpo"}, hyperparameters={}) == "hyperparameters"
    assert wrong(job, method={"type": "kto", "kto": {"hyperparameters": {"batch_size": 1}}}) == (
        "method.kto.hyperparameters.batch_size"
    )
    assert wrong(job, training={"sample_prompts": 9}) == "training.sample_prompts"
    assert wrong(job, training={"optimizer": "lion"}) == "training.optimizer"
    renamed = dict(job_fields(validated(JobBody, JOB)))
    assert (renamed["job.training_dataset"], renamed["job.training"]) == ("training_file", "training")


def test_a_preference_job() -> None:
    numbers = jobs_pb2.DpoHyperparameters(n_epochs=2, beta=0.5)
    message = jobs_pb2.Job(
        name="projects/acme/jobs/ftjob-2",
        method=jobs_pb2.Method(dpo=jobs_pb2.DpoMethod(hyperparameters=numbers)),
        training=jobs_pb2.TrainingOptions(schedule="constant"),
        parent_model="ft:tiny:acme::1",
        rerun_of="projects/acme/jobs/ftjob-1",
        comparison=jobs_pb2.WeightComparison(largest_difference=1e-6, tensor="w"),
    )
    body = job_json(message)
    assert body["hyperparameters"] is None
    found = body["method"]["dpo"]["hyperparameters"]
    assert (body["method"]["type"], found["beta"], found["batch_size"]) == ("dpo", 0.5, "auto")
    assert (body["training"]["schedule"], body["training"]["eval_every"]) == ("constant", None)
    assert (body["lathe"]["parent_model"], body["lathe"]["rerun_of"]) == ("ft:tiny:acme::1", "ftjob-1")
    assert body["lathe"]["comparison"]["largest_difference"] == 1e-6
    note = jobs_pb2.JobEvent(event_id="e", message="m", kind="generation", data={"prompt": "p"})
    assert event_json(note)["data"] == {"kind": "generation", "prompt": "p"}


def test_job_refusals() -> None:
    assert wrong(job, hyperparameters={"n_epochs": 0}) == "hyperparameters.n_epochs"
    assert wrong(job, hyperparameters={"n_epochs": 2.5}) == "hyperparameters.n_epochs"
    assert wrong(job, hyperparameters={"n_epochs": True}) == "hyperparameters.n_epochs"
    assert wrong(job, hyperparameters={"batch_size": 10**30}) == "hyperparameters.batch_size"
    name = "hyperparameters.learning_rate_multiplier"
    assert wrong(job, hyperparameters={"learning_rate_multiplier": 0}) == name
    assert wrong(job, method={"type": "reinforcement", "reinforcement": {}}) == "method.type"
    assert wrong(job, method={"type": "sft"}) == "method.type"
    assert wrong(job, method={"type": "supervised", "dpo": {}}) == "method.dpo"
    assert wrong(job, method={"type": "dpo", "reinforcement": {}}) == "method.reinforcement"
    assert wrong(job, integrations=[{"type": "wandb"}]) == "integrations"
    assert wrong(job, training_file="a/b") == "training_file"
    assert wrong(job, metadata={"a": 1}) == "metadata.a"
    assert wrong(job, suffix="") == "suffix"
    assert wrong(job, n_epochs=3) == "n_epochs"


def test_a_job() -> None:
    message = jobs_pb2.Job(
        name="projects/acme/jobs/ftjob-1",
        model="tiny",
        training_dataset="projects/acme/datasets/file-1",
        state=jobs_pb2.JOB_STATE_FAILED,
        state_reason="The file has errors.",
        error=jobs_pb2.JobError(code="invalid_n_examples", message="7 examples", param="training_file"),
        result_files=["projects/acme/datasets/file-9"],
        step=3,
    )
    body = job_json(message)
    assert (body["id"], body["status"], body["organization_id"]) == ("ftjob-1", "failed", "acme")
    assert body["error"] == {"code": "invalid_n_examples", "message": "7 examples", "param": "training_file"}
    assert (body["finished_at"], body["fine_tuned_model"], body["validation_file"]) == (None, None, None)
    assert body["hyperparameters"]["n_epochs"] == "auto" and body["result_files"] == ["file-9"]
    assert (body["lathe"]["state"], body["lathe"]["step"]) == ("failed", 3)


def test_every_job_state_is_one_that_clients_know() -> None:
    known = {"validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"}
    for name, number in jobs_pb2.JobState.items():
        body = job_json(jobs_pb2.Job(name="projects/acme/jobs/ftjob-1", state=number))
        assert body["status"] in known and name.endswith(body["lathe"]["state"].upper())


def test_events() -> None:
    metrics = jobs_pb2.StepMetrics(step=1, total_steps=4, train_loss=0.0, full_valid_loss=0.0)
    body = event_json(
        jobs_pb2.JobEvent(
            event_id="ftevent-1",
            type=jobs_pb2.EVENT_TYPE_METRICS,
            level=jobs_pb2.EVENT_LEVEL_WARN,
            metrics=metrics,
        )
    )
    assert (body["type"], body["level"]) == ("metrics", "warn")
    assert (body["data"]["train_loss"], body["data"]["full_valid_loss"], body["data"]["valid_loss"]) == (
        0,
        0,
        None,
    )
    assert event_json(jobs_pb2.JobEvent(event_id="e", message="m"))["data"] == {}


def test_metadata_filters() -> None:
    assert metadata_filter({"metadata[a]": "1", "limit": "3", "metadata[b c]": ""}) == {"a": "1", "b c": ""}
    with pytest.raises(InvalidArgument):
        metadata_filter({"metadata[]": "1"})
