"""Models on their way out: whole files or none, and no byte that was not stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lathe.client.models import Adapters, Models
from lathe.client.transport import Transport
from lathe.common.errors import DataLoss, Unavailable
from lathe.v1 import models_pb2 as pb


class Stored(Transport):
    """A transport to files in memory. breaks: how many streams end after three bytes."""

    def __init__(self, files: dict[str, bytes], breaks: int = 0) -> None:
        self.timeout = 30.0
        self.channel = grpc.insecure_channel("127.0.0.1:1")
        self.files, self.breaks = files, breaks
        self.asked: list[tuple[str, str, int]] = []

    def stream(
        self, method: Callable[..., Any], request: Any, *, timeout: float | None = None
    ) -> Iterator[Any]:
        self.asked.append((request.model, request.path, request.read_offset))
        rest = self.files[request.path][request.read_offset :]
        for start in range(0, len(rest), 3):
            yield pb.DownloadModelFileResponse(data=rest[start : start + 3])
            if self.breaks:
                self.breaks -= 1
                raise Unavailable("The gateway ended.", retry_after=0.0)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def base(files: dict[str, bytes]) -> pb.BaseModel:
    entries = [
        pb.ModelFile(path=path, size_bytes=len(data), sha256=sha256(data)) for path, data in files.items()
    ]
    return pb.BaseModel(name="baseModels/m", files=entries)


def test_a_base_model_comes_whole_over_streams_that_break(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"0123456789"}
    stored, told = Stored(files, breaks=2), list[tuple[str, int, int]]()
    Models(stored).fetch(base(files), tmp_path / "m", progress=lambda *what: told.append(what))
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == files
    assert ("m", "model.safetensors", 3) in stored.asked
    assert told[-1] == ("model.safetensors", 12, 12)


def test_other_bytes_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match=r"config\.json of m did not come as it was stored"):
        Models(Stored({"config.json": b"{}"})).fetch(base({"config.json": b"[]"}), tmp_path / "m")
    assert list((tmp_path / "m").iterdir()) == []


def test_no_file_is_written_outside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="outside its folder"):
        Models(Stored({})).fetch(base({"../evil": b""}), tmp_path / "m")
    assert not (tmp_path / "evil").exists()


def test_an_adapter_is_what_its_manifest_names_without_the_optimizer(tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"AB", "optimizer.safetensors": b"m"}
    entries = [{"path": path, "size": len(data), "sha256": sha256(data)} for path, data in files.items()]
    manifest = json.dumps({"files": entries}).encode()
    adapter = pb.Adapter(
        model_id="ft:m:p::1", object=pb.AdapterObject(prefix="x", manifest_sha256=sha256(manifest))
    )
    stored = Stored({**files, "manifest.json": manifest})
    Adapters(stored, "projects/p").fetch(adapter, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    adapter.object.manifest_sha256 = "other"
    with pytest.raises(DataLoss, match="not the one that was registered"):
        Adapters(stored, "projects/p").fetch(adapter, tmp_path / "b")
