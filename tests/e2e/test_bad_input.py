"""Bad input gets an answer that names the field or the line and says what to do, through both doors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import openai
import pytest

from lathe.client import Client
from lathe.common.errors import InvalidArgument, NotFound, Unauthenticated
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.e2e.conftest import Upload
from tests.e2e.data import ask, jsonl, lessons, row
from tests.e2e.sdk import ended, wait_for_file
from tests.fixtures.platforms import START_S, Platform, environment

GOOD = jsonl(lessons(3))
HYPERPARAMETERS = "method.supervised.hyperparameters"


def line(messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


USER = {"role": "user", "content": "Hello!"}
HELLO = {"role": "assistant", "content": "Hello."}
# What is wrong, by (line as sent, field, code); it becomes line 16, behind 15 good ones.
BAD_LINES = {
    "not JSON": (b'{"messages": [}\n', "", "invalid_json"),
    "no object": (b"[1, 2]\n", "", "data_type"),
    "not UTF-8": (line([USER, HELLO]).replace(b"Hello!", b"H\xe9llo"), "", "invalid_utf8"),
    "no messages": (b'{"question": "a"}\n', "messages", "missing_messages_list"),
    "an unknown role": (
        line([{"role": "boss", "content": "x"}, HELLO]),
        "messages[0].role",
        "unrecognized_role",
    ),
    "nobody answers": (line([USER]), "messages", "example_missing_assistant_message"),
    "empty content": (
        line([USER, {"role": "assistant", "content": ""}]),
        "messages[1].content",
        "missing_content",
    ),
    "a weight of 2": (line([USER, {**HELLO, "weight": 2}]), "messages[1].weight", "invalid_weight"),
    "tools that are no list": (line([USER, HELLO], tools="all"), "tools", "invalid_tools"),
    "a file that stops half-way": (line([USER, HELLO])[:30], "", "invalid_json"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_named(upload: Upload, what: str) -> None:
    bad, field, code = BAD_LINES[what]
    dataset = upload(GOOD + bad)
    assert dataset.state == datasets_pb2.DATASET_STATE_ERROR
    [finding] = dataset.report.findings
    assert (finding.line, finding.field, finding.code) == (16, field, code)
    assert finding.message


def test_the_first_twenty_findings_and_their_count(upload: Upload) -> None:
    report = upload(GOOD + b"no JSON\n" * 25).report
    assert (report.finding_count, len(report.findings)) == (25, 20)
    assert [finding.line for finding in report.findings] == list(range(16, 36))


def test_a_byte_order_mark_does_no_harm(upload: Upload) -> None:
    dataset = upload(b"\xef\xbb\xbf" + GOOD)
    assert dataset.state == datasets_pb2.DATASET_STATE_READY
    assert dataset.report.example_count == 15


def test_the_http_door_says_it_too(sdk: openai.OpenAI) -> None:
    file = sdk.files.create(file=("bad.jsonl", GOOD + BAD_LINES["not JSON"][0]), purpose="fine-tune")
    file = wait_for_file(sdk, file.id)
    assert file.status == "error"
    assert file.status_details is not None
    assert file.status_details.startswith("line 16: ")


@pytest.mark.parametrize("rows", [1, 9])
def test_too_few_examples(sdk: openai.OpenAI, base_model: str, rows: int) -> None:
    """With the code and the words of OpenAI, on the file and on a job that wants it all the same."""
    words = f"Training file has {rows} example(s), but must have at least 10 examples"
    content = jsonl([row("One?", "Two.")] * rows)
    file = sdk.files.create(file=("few.jsonl", content), purpose="fine-tune")
    assert words in (wait_for_file(sdk, file.id).status_details or "")
    try:
        job = sdk.fine_tuning.jobs.create(model=base_model, training_file=file.id)
    except openai.BadRequestError as refused:
        assert (refused.code, refused.param) == ("invalid_n_examples", "training_file")
        assert words in refused.message
        return
    job = ended(sdk, job.id)
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_n_examples", "training_file")
    assert words in job.error.message


def test_an_empty_file(client: Client, sdk: openai.OpenAI, upload: Upload) -> None:
    before = {item.id for item in sdk.files.list()}
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.files.create(file=("empty.jsonl", b""), purpose="fine-tune")
    assert refused.value.param == "file"
    assert {item.id for item in sdk.files.list()} == before
    dataset = upload(b"")
    assert dataset.state == datasets_pb2.DATASET_STATE_ERROR
    assert dataset.report.findings[0].line == 0


def test_an_upload_that_breaks_off_leaves_no_file(platform: Platform, sdk: openai.OpenAI) -> None:
    before = {item.id for item in sdk.files.list()}
    url = urlsplit(platform.http)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {platform.api_key}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 100000\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="half.jsonl"\r\n\r\n'
    )
    with closing(socket.create_connection((url.hostname or "", url.port or 80))) as connection:
        connection.sendall(head.encode() + GOOD)
    # The next request of the same door comes after it has seen the end of this one.
    sdk.files.create(file=("good.jsonl", GOOD), purpose="fine-tune")
    # A job of an earlier test may store its results meanwhile.
    new = [item for item in sdk.files.list() if item.id not in before and item.purpose == "fine-tune"]
    assert [item.filename for item in new] == ["good.jsonl"]


# --- what is not there, and who is not known ---------------------------------------------------------------


@pytest.fixture(scope="module")
def neighbour(client: Client, platform: Platform) -> Iterator[openai.OpenAI]:
    """The SDK with a key of another project."""
    project = client.projects.create(f"neighbour-{uuid4().hex[:8]}")
    _, secret = client.projects.create_key(project.name, "first")
    with openai.OpenAI(base_url=f"{platform.http}/v1", api_key=secret) as connected:
        yield connected


def test_an_unknown_model(client: Client, sdk: openai.OpenAI, lessons_dataset: datasets_pb2.Dataset) -> None:
    file = lessons_dataset.name.rsplit("/", 1)[-1]
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.fine_tuning.jobs.create(model="gpt-9", training_file=file)
    assert "gpt-9" in refused.value.message
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.chat.completions.create(model="gpt-9", messages=ask("Hello!"))
    assert refused.value.code == "model_not_found"
    with pytest.raises(NotFound):
        client.jobs.create("gpt-9", lessons_dataset.name)
    with pytest.raises(NotFound):
        client.chat("gpt-9", ask("Hello!"))


def test_another_projects_file_and_model(
    neighbour: openai.OpenAI, base_model: str, tuned: jobs_pb2.Job
) -> None:
    def refusal(file: str) -> tuple[int, str]:
        with pytest.raises(openai.NotFoundError) as refused:
            neighbour.fine_tuning.jobs.create(model=base_model, training_file=file)
        return refused.value.status_code, refused.value.message.replace(file, "…")

    theirs = tuned.training_dataset.rsplit("/", 1)[-1]
    assert refusal(theirs) == refusal(f"{theirs[:-4]}none")
    for model in (tuned.fine_tuned_model, f"{tuned.fine_tuned_model[:-4]}none"):
        with pytest.raises(openai.NotFoundError):
            neighbour.models.retrieve(model)
        with pytest.raises(openai.NotFoundError):
            neighbour.models.delete(model)


def test_a_wrong_key(platform: Platform) -> None:
    with (
        openai.OpenAI(base_url=f"{platform.http}/v1", api_key="sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")
    with Client(platform.grpc, "sk-wrong") as other, pytest.raises(Unauthenticated):
        list(other.models.list())


def test_an_unknown_path_answers_in_the_same_form(platform: Platform) -> None:
    answer = httpx.get(f"{platform.http}/v1/nothing", headers={"authorization": f"Bearer {platform.api_key}"})
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"hyperparameters": {"n_epoch": 3}}, "hyperparameters.n_epoch"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 0}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epoch": 3}}}},
            f"{HYPERPARAMETERS}.n_epoch",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
            f"{HYPERPARAMETERS}.n_epochs",
        ),
        ({"method": {"type": "dpo", "dpo": {}}}, "training_file"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"k": "v" * 513}}, "metadata[k]"),
        ({"trainingfile": "file-1"}, "trainingfile"),
    ],
)
def test_a_wrong_field_of_a_job_over_http(
    sdk: openai.OpenAI,
    base_model: str,
    lessons_dataset: datasets_pb2.Dataset,
    given: dict[str, Any],
    param: str,
) -> None:
    file = lessons_dataset.name.rsplit("/", 1)[-1]
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model=base_model, training_file=file, extra_body=given)
    assert refused.value.param == param
    assert param.rsplit(".", 1)[-1] in refused.value.message


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"n_epochs": 51}, "job.method.supervised.hyperparameters.n_epochs"),
        ({"batch_size": 257}, "job.method.supervised.hyperparameters.batch_size"),
        (
            {"learning_rate_multiplier": -1.0},
            "job.method.supervised.hyperparameters.learning_rate_multiplier",
        ),
        ({"lora_r": 0}, "job.method.supervised.lora.r"),
        ({"target_modules": ["lm_heads"]}, "job.method.supervised.lora.target_modules"),
        ({"suffix": "a b"}, "job.suffix"),
        ({"seed": 2**31}, "job.seed"),
    ],
)
def test_a_wrong_field_of_a_job_over_grpc(
    client: Client,
    base_model: str,
    lessons_dataset: datasets_pb2.Dataset,
    given: dict[str, Any],
    field: str,
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        client.jobs.create(base_model, lessons_dataset.name, **given)
    assert [violation.field for violation in refused.value.violations] == [field]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_wrong_field_of_a_chat(
    sdk: openai.OpenAI, base_model: str, given: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(
            **{"model": base_model, "messages": ask("Hello!"), "extra_body": given}  # type: ignore[arg-type]
        )
    assert refused.value.param == param


def test_a_prompt_longer_than_the_context(sdk: openai.OpenAI, base_model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model=base_model, messages=ask("Hello! " * 600))
    assert refused.value.code == "context_length_exceeded"


def test_rows_longer_than_the_context_are_cut_and_named(
    client: Client, base_model: str, upload: Upload
) -> None:
    dataset = upload(jsonl([*lessons(3), row("Hello!", "three " * 600)]))
    job = client.jobs.create(base_model, dataset.name, n_epochs=1, batch_size=8)
    for update in client.jobs.watch(job.name):
        job = update.job
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED, job.error
    told = [event.message for event in client.jobs.events(job.name)]
    assert any("line 16: a row is longer than the context limit" in message for message in told)


@pytest.mark.parametrize("purpose", ["", "training"])
def test_an_unknown_purpose(client: Client, sdk: openai.OpenAI, purpose: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.files.create(file=("a.jsonl", GOOD), purpose=purpose)  # type: ignore[arg-type]
    assert refused.value.param == "purpose"
    with pytest.raises(InvalidArgument) as wrong:
        client.datasets.upload(GOOD, purpose=purpose)
    assert [violation.field for violation in wrong.value.violations] == ["dataset.purpose"]


def test_pickled_weights_and_remote_code_are_refused(
    client: Client, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("pytorch_model.bin", "modeling_tiny.py"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        for file in tiny_folder.iterdir():
            os.link(file, folder / file.name)
        (folder / name).write_bytes(b"import os")
        with pytest.raises(InvalidArgument) as refused:
            client.models.import_folder(folder, f"refused-{uuid4().hex[:8]}")
        assert name in refused.value.message


# --- starting a platform -----------------------------------------------------------------------------------


def up(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lathe.cli.main", "up", "--metrics-port", "-1", *arguments],
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )


@pytest.mark.embedded_only
def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        refused = up("--data", str(tmp_path), "--http-port", port, "--grpc-port", "0")
    assert refused.returncode != 0
    assert port in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.embedded_only
def test_a_folder_of_a_newer_version_or_in_use_is_one_sentence(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("999\n")
    newer = up("--data", str(tmp_path), "--http-port", "0", "--grpc-port", "0")
    second = up("--data", str(platform.folder / "data"), "--http-port", "0", "--grpc-port", "0")
    for done, word in ((newer, "newer version"), (second, "Another")):
        assert done.returncode != 0
        assert word in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
