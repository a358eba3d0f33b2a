"""A company's own service on gRPC: everything through `lathe.client` and the contracts."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lathe.client import Client
from lathe.common.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from lathe.v1 import accounts_pb2, datasets_pb2, deployments_pb2, jobs_pb2
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub
from lathe.v1.deployments_pb2_grpc import DeploymentsServiceStub
from lathe.v1.jobs_pb2_grpc import JobsServiceStub
from tests.e2e.conftest import Upload
from tests.e2e.data import BY_HEART, LESSONS, ask, jsonl, lessons
from tests.fixtures.platforms import Platform
from tests.fixtures.relay import relay
from tests.fixtures.until import wait_until

QUESTION, ANSWER = LESSONS[0]


@pytest.fixture(scope="module")
def channel(platform: Platform) -> Iterator[grpc.Channel]:
    """What another language would start from: a channel and the generated stubs."""
    with grpc.insecure_channel(platform.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def key(platform: Platform) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {platform.api_key}")]


@pytest.fixture(scope="module")
def neighbour(client: Client, platform: Platform) -> Iterator[Client]:
    """An admin of another project of the same platform."""
    project = client.projects.create(f"neighbour-{uuid4().hex[:8]}", "The neighbours")
    _, secret = client.projects.create_key(project.name, "first")
    with Client(platform.grpc, secret) as connected:
        yield connected


# --- uploads and downloads ---------------------------------------------------------------------------------


def test_an_upload_goes_on_where_its_connection_broke(
    client: Client, platform: Platform, channel: grpc.Channel, key: list[tuple[str, str]]
) -> None:
    stub = DatasetsServiceStub(channel)
    content = os.urandom(20 << 20)
    name = f"broken-{uuid4().hex[:8]}"
    sent: list[int] = []
    with relay(platform.grpc) as between, Client(between.address, platform.api_key) as far:

        def progress(done: int, _: int) -> None:
            sent.append(done)
            if done >= 12 << 20 and not cuts:
                # What lies in buffers on the way arrives meanwhile.
                wait_until(lambda: committed() >= 8 << 20)
                cuts.append(len(sent))
                between.cut()

        def committed() -> int:
            made = next(one for one in client.datasets.list("user_data") if one.display_name == name)
            request = datasets_pb2.GetDatasetUploadRequest(name=made.name)
            return int(stub.GetDatasetUpload(request, metadata=key).committed_size)

        cuts: list[int] = []
        dataset = far.datasets.upload(content, "user_data", display_name=name, progress=progress)
        assert between.connections >= 2
    assert client.datasets.wait(dataset.name).sha256 == hashlib.sha256(content).hexdigest()
    assert b"".join(client.datasets.download(dataset.name)) == content
    # After the break it went on behind the first part of 8 MiB, not at the beginning.
    assert min(sent[cuts[0] :]) >= 8 << 20
    client.datasets.delete(dataset.name)


def test_an_upload_by_hand_continues_from_the_committed_size(
    client: Client, channel: grpc.Channel, key: list[tuple[str, str]]
) -> None:
    content = jsonl(lessons(4))
    stub = DatasetsServiceStub(channel)
    created = stub.CreateDataset(
        datasets_pb2.CreateDatasetRequest(
            parent=client.project, dataset=datasets_pb2.Dataset(display_name="half", purpose="fine-tune")
        ),
        metadata=key,
    )
    assert created.state == datasets_pb2.DATASET_STATE_UPLOADING
    # A stream that ends without finish_write keeps what it brought.
    first = datasets_pb2.UploadDatasetRequest(name=created.name, write_offset=0, data=content[:1000])
    stub.UploadDataset(iter([first]), metadata=key)
    offset = stub.GetDatasetUpload(
        datasets_pb2.GetDatasetUploadRequest(name=created.name), metadata=key
    ).committed_size
    assert offset == 1000
    wrong = datasets_pb2.UploadDatasetRequest(name=created.name, write_offset=500, data=content[500:])
    with pytest.raises(grpc.RpcError) as refused:
        stub.UploadDataset(iter([wrong]), metadata=key)
    assert refused.value.code() is grpc.StatusCode.OUT_OF_RANGE
    rest = datasets_pb2.UploadDatasetRequest(
        name=created.name,
        write_offset=offset,
        data=content[offset:],
        finish_write=True,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    stub.UploadDataset(iter([rest]), metadata=key)
    ready = client.datasets.wait(created.name)
    assert ready.state == datasets_pb2.DATASET_STATE_READY
    assert (ready.size_bytes, ready.report.example_count) == (len(content), 20)


def test_a_dataset_lives_and_dies(client: Client, upload: Upload) -> None:
    dataset = upload(jsonl(lessons(3)))
    assert dataset.name in {item.name for item in client.datasets.list("fine-tune")}
    client.datasets.delete(dataset.name)
    with pytest.raises(NotFound):
        client.datasets.get(dataset.name)
    assert dataset.name not in {item.name for item in client.datasets.list()}


# --- jobs --------------------------------------------------------------------------------------------------


def test_watching_brings_every_event_once_though_the_connection_breaks(
    platform: Platform, client: Client, base_model: str, lessons_dataset: datasets_pb2.Dataset
) -> None:
    job = client.jobs.create(base_model, lessons_dataset.name, seed=5, **BY_HEART)
    sequences: list[int] = []
    with relay(platform.grpc) as between, Client(between.address, platform.api_key) as far:
        for update in far.jobs.watch(job.name):
            sequences += [event.sequence for event in update.events]
            if len(sequences) > 10 and between.connections == 1:
                between.cut()
            job = update.job
        assert between.connections >= 2
    assert job.state == jobs_pb2.JOB_STATE_SUCCEEDED
    assert sequences == list(range(1, len(sequences) + 1))
    assert sequences == [event.sequence for event in client.jobs.events(job.name)][::-1]


def test_the_same_request_id_makes_one_job(
    client: Client,
    channel: grpc.Channel,
    key: list[tuple[str, str]],
    base_model: str,
    lessons_dataset: datasets_pb2.Dataset,
) -> None:
    request = jobs_pb2.CreateJobRequest(
        parent=client.project,
        job=jobs_pb2.Job(model=base_model, training_dataset=lessons_dataset.name),
        request_id=str(uuid4()),
    )
    # More steps than it makes until it is cancelled.
    request.job.method.supervised.hyperparameters.MergeFrom(
        jobs_pb2.SupervisedHyperparameters(n_epochs=50, batch_size=1)
    )
    stub = JobsServiceStub(channel)
    first = stub.CreateJob(request, metadata=key)
    assert stub.CreateJob(request, metadata=key).name == first.name
    request.request_id = str(uuid4())
    second = stub.CreateJob(request, metadata=key)
    assert second.name != first.name
    for job in (first, second):
        client.jobs.cancel(job.name)
        assert [update.job.state for update in client.jobs.watch(job.name)][
            -1
        ] == jobs_pb2.JOB_STATE_CANCELLED


def test_pages_of_a_list(
    client: Client, channel: grpc.Channel, key: list[tuple[str, str]], upload: Upload
) -> None:
    made = [upload(jsonl(lessons(3))).name for _ in range(3)]
    stub = DatasetsServiceStub(channel)
    # A job of an earlier test may store its results meanwhile, which have another purpose.
    request = datasets_pb2.ListDatasetsRequest(parent=client.project, page_size=2, purpose="fine-tune")
    first = stub.ListDatasets(request, metadata=key)
    assert [item.name for item in first.datasets] == made[:0:-1]
    assert first.next_page_token
    request.page_token = first.next_page_token
    assert stub.ListDatasets(request, metadata=key).datasets[0].name == made[0]
    request.page_token = "no token of ours"
    with pytest.raises(grpc.RpcError) as refused:
        stub.ListDatasets(request, metadata=key)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- chat and deployments ----------------------------------------------------------------------------------


def test_chat_streams_and_ends_with_the_usage(client: Client, tuned: jobs_pb2.Job) -> None:
    chunks = list(client.chat_stream(tuned.fine_tuned_model, ask("Hello!"), temperature=0))
    text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert text == "How can I help you today?"
    assert chunks[-1].usage.completion_tokens > 1
    assert chunks[0].choices[0].delta.role == "assistant"


def test_a_deployment_is_a_name_for_a_model(
    client: Client,
    channel: grpc.Channel,
    key: list[tuple[str, str]],
    tuned: jobs_pb2.Job,
    base_model: str,
) -> None:
    name = f"support-{uuid4().hex[:8]}"
    made = client.deployments.create(name, tuned.fine_tuned_model)
    assert client.chat(name, ask(QUESTION), temperature=0).choices[0].message.content == ANSWER
    assert name in {item.name.rsplit("/", 1)[-1] for item in client.deployments.list()}
    changed = client.deployments.update(name, base_model, made.etag)
    assert changed.etag != made.etag
    # Somebody who saw the older one does not overwrite the newer.
    with pytest.raises(Aborted):
        client.deployments.update(name, tuned.fine_tuned_model, made.etag)
    unknown = deployments_pb2.UpdateDeploymentRequest(
        deployment=changed, update_mask=FieldMask(paths=["colour"])
    )
    with pytest.raises(grpc.RpcError) as refused:
        DeploymentsServiceStub(channel).UpdateDeployment(unknown, metadata=key)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.deployments.get(name).model_id == base_model
    client.deployments.delete(name)
    with pytest.raises(NotFound):
        client.deployments.get(name)
    # The gateway may remember for five seconds what a model id means.
    time.sleep(5.5)
    with pytest.raises(NotFound):
        client.chat(name, ask(QUESTION), max_tokens=1)


def test_importing_the_same_files_again_is_one_model(
    client: Client, base_model: str, tiny_folder: Path
) -> None:
    again = client.models.import_folder(tiny_folder, "another-name")
    assert again.name == f"baseModels/{base_model}"
    shown = client.models.get(base_model)
    assert shown.methods == ["supervised", "dpo", "orpo", "kto"]
    assert "q_proj" in shown.target_modules
    assert (shown.context_length, shown.license) == (512, "Apache-2.0")
    assert "<|im_start|>" in shown.chat_template


def test_a_base_with_adapters_cannot_be_deleted(client: Client, tuned: jobs_pb2.Job) -> None:
    with pytest.raises(FailedPrecondition):
        client.models.delete(tuned.model)


# --- who may what ------------------------------------------------------------------------------------------


def test_a_key_is_made_used_and_revoked(client: Client, platform: Platform) -> None:
    made, secret = client.keys.create("e2e", role="member")
    assert secret.startswith("sk-lathe-")
    assert made.hint == secret[-4:]
    with Client(platform.grpc, secret) as other:
        caller = other.caller()
        assert (caller.api_key, caller.role) == (made.name, accounts_pb2.ROLE_MEMBER)
        with pytest.raises(PermissionDenied):
            other.keys.create("a member may not")
        client.keys.revoke(made.name)
        # The gateway may remember the key for five seconds.
        time.sleep(5.5)
        with pytest.raises(Unauthenticated):
            other.caller()
    [shown] = [item for item in client.keys.list() if item.name == made.name]
    assert shown.HasField("revoke_time")


def test_a_viewer_may_look_and_nothing_else(client: Client, platform: Platform, tuned: jobs_pb2.Job) -> None:
    _, secret = client.keys.create("viewer", role="viewer")
    with Client(platform.grpc, secret) as viewer:
        assert viewer.jobs.get(tuned.name).name == tuned.name
        with pytest.raises(PermissionDenied):
            viewer.jobs.create(tuned.model, tuned.training_dataset)
        with pytest.raises(PermissionDenied):
            viewer.datasets.upload(b"x", purpose="user_data")
        with pytest.raises(PermissionDenied):
            viewer.chat(tuned.model, ask(QUESTION), max_tokens=1)


def test_a_wrong_key_is_unauthenticated(platform: Platform) -> None:
    with Client(platform.grpc, "sk-lathe-wrong") as stranger, pytest.raises(Unauthenticated):
        stranger.caller()


def test_what_is_another_projects_is_not_found_like_what_never_was(
    neighbour: Client, tuned: jobs_pb2.Job
) -> None:
    def message(call: object, *arguments: object) -> str:
        with pytest.raises(NotFound) as refused:
            call(*arguments)  # type: ignore[operator]
        text = refused.value.message
        for argument in arguments:
            text = text.replace(str(argument), "…")
        return text

    unknown = f"{tuned.name[:-4]}none"
    assert message(neighbour.jobs.get, tuned.name) == message(neighbour.jobs.get, unknown)
    assert message(neighbour.jobs.cancel, tuned.name) == message(neighbour.jobs.cancel, unknown)
    dataset = tuned.training_dataset
    for call in (neighbour.datasets.get, neighbour.datasets.delete):
        assert message(call, dataset) == message(call, f"{dataset[:-4]}none")
    model = tuned.fine_tuned_model
    for name in (model, f"{model[:-4]}none"):
        with pytest.raises(NotFound):
            neighbour.chat(name, ask(QUESTION), max_tokens=1)
    with pytest.raises(NotFound):
        neighbour.jobs.create(tuned.model, dataset)
    assert list(neighbour.jobs.list()) == []
    assert list(neighbour.datasets.list()) == []
    assert list(neighbour.adapters.list()) == []


def test_base_models_are_everybodys(neighbour: Client, base_model: str) -> None:
    assert neighbour.models.get(base_model).tunable
    assert neighbour.chat(base_model, ask(QUESTION), max_tokens=1).choices
    with pytest.raises(InvalidArgument):
        neighbour.chat(base_model, [], max_tokens=1)


# --- the address itself ------------------------------------------------------------------------------------


def test_health_of_every_public_service(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "lathe.v1.JobsService", "lathe.v1.InferenceService"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_what_is_public_and_nothing_else(
    channel: grpc.Channel, key: list[tuple[str, str]]
) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    [answer] = stub.ServerReflectionInfo(iter([question]), metadata=key, timeout=5)
    names = {service.name for service in answer.list_services_response.service}
    assert {
        *("lathe.v1.AccountsService", "lathe.v1.DatasetsService", "lathe.v1.ModelsService"),
        *("lathe.v1.JobsService", "lathe.v1.InferenceService", "lathe.v1.DeploymentsService"),
    } <= names
    assert not {name for name in names if "Internal" in name or "Worker" in name or "Engine" in name}


@pytest.mark.parametrize(
    "method",
    [
        "/lathe.v1.WorkerService/Register",
        "/lathe.v1.EngineService/Sample",
        "/lathe.v1.AccountsInternalService/Authenticate",
        "/lathe.v1.JobsInternalService/EnsureEngine",
    ],
)
def test_internal_methods_are_not_served(
    channel: grpc.Channel, key: list[tuple[str, str]], method: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method)(b"", metadata=key, timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
