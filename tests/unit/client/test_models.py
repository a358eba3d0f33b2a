"""Sending a model's weights while the platform comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from lathe.client import datasets as datasets_client
from lathe.client import models as models_client
from lathe.client import transport as transport_client
from lathe.client.content import CHUNK_BYTES
from lathe.client.datasets import Datasets
from lathe.client.models import Models
from lathe.common.errors import Unavailable
from lathe.v1 import datasets_pb2
from lathe.v1 import models_pb2 as pb


class Time:
    """In place of the module."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    for module in (models_client, datasets_client, transport_client):
        monkeypatch.setattr(module, "time", made)
    return made


class Platform:
    """A transport. answers: what each question gets where to go on; an Unavailable has used up its own half minute.

    breaks: how many streams break, each after `stream_s` seconds.
    """

    timeout = 30.0

    def __init__(self, time: Time, answers: list[int | Unavailable], breaks: int = 1, stream_s: float = 1.0):
        self.channel = grpc.insecure_channel("127.0.0.1:1")
        self.time, self.answers, self.breaks, self.stream_s = time, answers, breaks, stream_s
        self.offsets: list[int] = []

    def call(self, method: Callable[..., Any], request: object, *, timeout: float | None = None) -> object:
        if isinstance(request, pb.CreateBaseModelRequest):
            return pb.BaseModel(name="baseModels/m", files=request.base_model.files)
        if isinstance(request, pb.GetModelFileUploadRequest):
            return pb.ModelFileUpload(committed_size=self._answer())
        if isinstance(request, datasets_pb2.GetDatasetUploadRequest):
            return datasets_pb2.DatasetUpload(committed_size=self._answer())
        if isinstance(request, datasets_pb2.CreateDatasetRequest):
            return datasets_pb2.Dataset(name="projects/p/datasets/file-1")
        return pb.BaseModel(name="baseModels/m", state=pb.BASE_MODEL_STATE_READY)

    def _answer(self) -> int:
        answer = self.answers.pop(0)
        if isinstance(answer, Unavailable):
            self.time.now += self.timeout
            raise answer
        return answer

    def send(self, method: Callable[..., Any], requests: Iterable[Any]) -> object:
        first, *_ = requests
        self.offsets.append(first.write_offset)
        if len(self.offsets) <= self.breaks:
            self.time.now += self.stream_s
            raise Unavailable("The gateway ended.", retry_after=1.0)
        return datasets_pb2.Dataset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(bytes(CHUNK_BYTES + 1))
    return tmp_path


def import_(platform: Platform, folder: Path) -> None:
    model = Models(platform).import_folder(folder, "m")  # type: ignore[arg-type]
    assert model.state == pb.BASE_MODEL_STATE_READY


def test_an_outage_longer_than_one_call_breaks_no_import(time: Time, folder: Path) -> None:
    """Two minutes are promised, and asking where to go on gives up after half of one."""
    away = Unavailable("Nobody answers.")
    platform = Platform(time, [0, away, away, 7])
    import_(platform, folder)
    assert platform.offsets == [0, 7]


def test_a_stream_that_breaks_after_an_hour_is_gone_on_with(time: Time, folder: Path) -> None:
    platform = Platform(time, [0, 7, 8], breaks=2, stream_s=3600.0)
    import_(platform, folder)
    assert platform.offsets == [0, 7, 8]


def test_a_stream_that_gets_nowhere_is_given_up(time: Time, folder: Path) -> None:
    platform = Platform(time, [0] * 100, breaks=100, stream_s=50.0)
    with pytest.raises(Unavailable, match="gateway ended"):
        import_(platform, folder)
    assert time.now < 300


def test_a_datasets_stream_that_breaks_after_an_hour_is_gone_on_with_too(time: Time) -> None:
    platform = Platform(time, [7, 8], breaks=2, stream_s=3600.0)
    Datasets(platform, "projects/p").upload(bytes(20))  # type: ignore[arg-type]
    assert platform.offsets == [0, 7, 8]
    platform = Platform(time, [0] * 100, breaks=100, stream_s=50.0)
    with pytest.raises(Unavailable, match="gateway ended"):
        Datasets(platform, "projects/p").upload(bytes(20))  # type: ignore[arg-type]
    assert len(platform.offsets) < 5
