"""What the public client does when connections break, against a server that breaks them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2

from lathe.client import Client
from lathe.client import datasets as client_datasets
from lathe.client.content import CHUNK_BYTES, Content, ContentDigest
from lathe.common.errors import FailedPrecondition, InvalidArgument, LatheError, Unavailable
from lathe.common.rpc.status import to_rpc_status
from lathe.v1 import (
    accounts_pb2,
    accounts_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
)

DATA = bytes(range(256)) * (CHUNK_BYTES // 256 * 3) + b"end"
NAME = "projects/p/datasets/file-1"


class Accounts(accounts_pb2_grpc.AccountsServiceServicer):
    def GetCaller(self, request: Any, context: Any) -> accounts_pb2.Caller:
        return accounts_pb2.Caller(project="projects/p")


class Datasets(datasets_pb2_grpc.DatasetsServiceServicer):
    """Keeps what it got; `breaks` says after how many bytes each stream ends with UNAVAILABLE."""

    def __init__(self, breaks: list[int], *, lose_answer: bool = False) -> None:
        self.breaks, self.lose_answer = breaks, lose_answer
        self.stored, self.done = bytearray(), False
        self.request_ids, self.deleted = list[str](), list[str]()

    def CreateDataset(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        self.request_ids.append(request.request_id)
        if len(self.request_ids) == 1:
            away(context)
        return datasets_pb2.Dataset(name=NAME)

    def UploadDataset(self, requests: Iterator[Any], context: Any) -> datasets_pb2.Dataset:
        limit = self.breaks.pop(0) if self.breaks else None
        got = -1
        for message in requests:
            got = max(got, 0)
            assert message.write_offset == len(self.stored)
            self.stored += message.data
            got += len(message.data)
            if message.finish_write:
                assert message.sha256 == hashlib.sha256(self.stored).hexdigest()
                self.done = True
                if self.lose_answer:
                    away(context)
                return self.GetDataset(None, context)
            if limit is not None and got >= limit:
                away(context)
        if got < 0:
            refuse(context, InvalidArgument("The stream was empty."))
        return datasets_pb2.Dataset(name=NAME, state=datasets_pb2.DATASET_STATE_UPLOADING)

    def DeleteDataset(self, request: Any, context: Any) -> empty_pb2.Empty:
        self.deleted.append(request.name)
        return empty_pb2.Empty()

    def GetDatasetUpload(self, request: Any, context: Any) -> datasets_pb2.DatasetUpload:
        if self.done:
            refuse(context, FailedPrecondition("complete", reason="UPLOAD_COMPLETE"))
        return datasets_pb2.DatasetUpload(committed_size=len(self.stored))

    def GetDataset(self, request: Any, context: Any) -> datasets_pb2.Dataset:
        return datasets_pb2.Dataset(
            name=NAME, state=datasets_pb2.DATASET_STATE_READY, sha256=hashlib.sha256(self.stored).hexdigest()
        )

    def DownloadDataset(self, request: Any, context: Any) -> Iterator[datasets_pb2.DownloadDatasetResponse]:
        end = request.read_offset + CHUNK_BYTES
        yield datasets_pb2.DownloadDatasetResponse(data=DATA[request.read_offset : end])
        if end < len(DATA):
            away(context)


class Models(models_pb2_grpc.ModelsServiceServicer):
    """One file of an import; each stream but the last breaks after a message."""

    def __init__(self, breaks: int) -> None:
        self.breaks, self.stored, self.received = breaks, bytearray(), 0

    def CreateBaseModel(self, request: Any, context: Any) -> models_pb2.BaseModel:
        return models_pb2.BaseModel(
            name="baseModels/m", state=models_pb2.BASE_MODEL_STATE_UPLOADING, files=request.base_model.files
        )

    def GetModelFileUpload(self, request: Any, context: Any) -> models_pb2.ModelFileUpload:
        return models_pb2.ModelFileUpload(committed_size=len(self.stored))

    def UploadModelFile(self, requests: Iterator[Any], context: Any) -> models_pb2.UploadModelFileResponse:
        assert next(requests).write_offset == len(self.stored)
        for message in requests:
            self.stored += message.data
            self.received += len(message.data)
            if self.breaks:
                self.breaks -= 1
                away(context)
        return models_pb2.UploadModelFileResponse()

    def CommitBaseModel(self, request: Any, context: Any) -> models_pb2.BaseModel:
        return models_pb2.BaseModel(name=request.name, state=models_pb2.BASE_MODEL_STATE_READY)


class Jobs(jobs_pb2_grpc.JobsServiceServicer):
    """Two events a stream, then it breaks; six make the job."""

    def WatchJob(self, request: Any, context: Any) -> Iterator[jobs_pb2.WatchJobResponse]:
        first = request.after_sequence + 1
        for sequence in (first, first + 1):
            state = jobs_pb2.JOB_STATE_SUCCEEDED if sequence == 6 else jobs_pb2.JOB_STATE_RUNNING
            yield jobs_pb2.WatchJobResponse(
                job=jobs_pb2.Job(state=state), events=[jobs_pb2.JobEvent(sequence=sequence)]
            )
        if first + 1 < 6:
            away(context)


def refuse(context: Any, error: LatheError) -> None:
    code, message, metadata = to_rpc_status(error)
    context.set_trailing_metadata(metadata)
    context.abort(code, message)


def away(context: Any) -> None:
    refuse(context, Unavailable("away", retry_after=0.01))


@pytest.fixture
def serve() -> Iterator[Any]:
    server = grpc.server(ThreadPoolExecutor(4))
    clients: list[Client] = []

    def start(datasets: Datasets, models: Models | None = None) -> Client:
        models_pb2_grpc.add_ModelsServiceServicer_to_server(models or Models(0), server)
        accounts_pb2_grpc.add_AccountsServiceServicer_to_server(Accounts(), server)
        datasets_pb2_grpc.add_DatasetsServiceServicer_to_server(datasets, server)
        jobs_pb2_grpc.add_JobsServiceServicer_to_server(Jobs(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        clients.append(Client(f"127.0.0.1:{port}", "sk-lathe-x", timeout=60))
        return clients[0]

    yield start
    for client in clients:
        client.close()
    server.stop(0)


def test_an_upload_goes_on_where_it_broke(serve: Any) -> None:
    datasets = Datasets([CHUNK_BYTES, CHUNK_BYTES])
    sent: list[int] = []
    dataset = serve(datasets).datasets.upload(DATA, progress=lambda done, total: sent.append(done))
    assert (bytes(datasets.stored), dataset.name) == (DATA, NAME)
    assert sent[-1] == len(DATA)
    # The create was repeated under one request_id.
    assert len(datasets.request_ids) == 2
    assert len(set(datasets.request_ids)) == 1


def test_an_import_goes_on_where_it_broke_and_sends_nothing_twice(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(DATA)
    models = Models(2)
    serve(Datasets([]), models).models.import_folder(tmp_path, "m")
    assert bytes(models.stored) == DATA
    assert models.received == len(DATA)


def test_an_upload_whose_answer_was_lost_is_complete(serve: Any) -> None:
    datasets = Datasets([], lose_answer=True)
    assert serve(datasets).datasets.upload(DATA).sha256 == hashlib.sha256(DATA).hexdigest()


def test_a_file_that_changes_on_its_way_is_refused_and_forgotten(serve: Any, tmp_path: Path) -> None:
    datasets, file = Datasets([CHUNK_BYTES]), tmp_path / "train.jsonl"
    file.write_bytes(DATA)

    def write_more(sent: int, size: int) -> None:
        if sent == CHUNK_BYTES:
            file.write_bytes(DATA[:-1] + b"x")
            os.utime(file, ns=(1, 1))

    with pytest.raises(InvalidArgument, match=r"train\.jsonl changed while it was uploaded") as refused:
        serve(datasets).datasets.upload(file, progress=write_more)
    assert refused.value.reason == "FILE_CHANGED"
    assert datasets.deleted == [NAME] and not datasets.done


@pytest.mark.parametrize("size", [10, 3 * CHUNK_BYTES])
def test_a_file_that_is_gone_when_it_is_read_is_refused_and_forgotten(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    datasets, file = Datasets([CHUNK_BYTES]), tmp_path / "train.jsonl"
    file.write_bytes(DATA[:size])
    create = datasets.CreateDataset

    def create_and_remove(request: Any, context: Any) -> datasets_pb2.Dataset:
        file.unlink(missing_ok=True)
        return create(request, context)

    monkeypatch.setattr(datasets, "CreateDataset", create_and_remove)
    with pytest.raises(InvalidArgument, match=r"train\.jsonl cannot be read: No such file"):
        serve(datasets).datasets.upload(file)
    assert datasets.deleted == [NAME] and not datasets.stored


def test_a_stream_of_which_only_the_end_was_lost_is_finished(serve: Any) -> None:
    datasets = Datasets([])
    datasets.stored += DATA
    client = serve(datasets).datasets
    upload = client_datasets._Upload(
        client._transport, client._stub, NAME, ContentDigest(Content.of(DATA)), None
    )
    upload._digest.add(0, DATA)
    client._transport.send(client._stub.UploadDataset, upload._messages(len(DATA)))
    assert datasets.done and bytes(datasets.stored) == DATA


def test_an_empty_file_is_sent_as_one_empty_message(serve: Any) -> None:
    datasets = Datasets([])
    serve(datasets).datasets.upload(b"")
    assert datasets.done
    assert not datasets.stored


def test_a_download_goes_on_where_it_broke(serve: Any) -> None:
    assert b"".join(serve(Datasets([])).datasets.download("file-1")) == DATA


def test_a_watch_shows_every_event_once(serve: Any) -> None:
    updates = list(serve(Datasets([])).jobs.watch("ftjob-1"))
    assert [event.sequence for update in updates for event in update.events] == [1, 2, 3, 4, 5, 6]
