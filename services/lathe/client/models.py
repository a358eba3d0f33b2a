"""Base models that operators import, and the adapters that jobs made."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lathe.client.content import CHUNK_BYTES
from lathe.client.names import full_name
from lathe.client.paging import pages
from lathe.client.transport import Transport, new_request_id, pause
from lathe.common.errors import (
    Aborted,
    DataLoss,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
    Unimplemented,
)
from lathe.v1 import models_pb2 as pb
from lathe.v1.models_pb2_grpc import ModelsServiceStub

_COMMIT_S = 600.0
_MANIFEST = "manifest.json"
# A checkpoint's, for going on with; no part of the model.
_OPTIMIZER = "optimizer.safetensors"
# How long a file that cannot be sent is tried again.
_PATIENCE_S = 120.0

# (path inside the folder, bytes sent of all files, bytes of all files)
ImportProgress = Callable[[str, int, int], None]


class Models:
    """The base models of the platform."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = ModelsServiceStub(transport.channel)

    def list(self) -> Iterator[pb.BaseModel]:
        return pages(self._transport, self._stub.ListBaseModels, pb.ListBaseModelsRequest(), "base_models")

    def get(self, model_id: str) -> pb.BaseModel:
        """Raises NotFound."""
        return self._transport.call(self._stub.GetBaseModel, pb.GetBaseModelRequest(name=_base(model_id)))

    def delete(self, model_id: str) -> None:
        """Raises NotFound; FailedPrecondition while an adapter is built on it."""
        self._transport.call(self._stub.DeleteBaseModel, pb.DeleteBaseModelRequest(name=_base(model_id)))

    def import_folder(
        self,
        folder: Path | str,
        model_id: str,
        *,
        display_name: str = "",
        license: str = "",
        training_cutoff: str = "",
        source: str = "",
        progress: ImportProgress | None = None,
    ) -> pb.BaseModel:
        """Import a Hugging Face folder (safetensors); for admins.

        The answer is the model, under another id if the same files are there already. Only files that the platform
        has not got are sent. Raises InvalidArgument naming the file that is refused, AlreadyExists when the id stands
        for other files.
        """
        root = Path(folder)
        request = pb.CreateBaseModelRequest(
            base_model=pb.BaseModel(
                display_name=display_name,
                files=_files(root),
                license=license,
                training_cutoff=training_cutoff,
                source=source,
            ),
            base_model_id=model_id,
            request_id=new_request_id(),
        )
        model = self._transport.call(self._stub.CreateBaseModel, request)
        if model.state == pb.BASE_MODEL_STATE_READY:
            return model
        sending = _Sending(self._transport, self._stub, root, progress)
        sending.all(model)
        return self._transport.call(
            self._stub.CommitBaseModel, pb.CommitBaseModelRequest(name=model.name), timeout=_COMMIT_S
        )

    def fetch(
        self, model: pb.BaseModel, folder: Path | str, *, progress: ImportProgress | None = None
    ) -> None:
        """The model's files into `folder`, which is made. Raises DataLoss for bytes that are not what was imported."""
        files = [_Wanted(file.path, file.size_bytes, file.sha256) for file in model.files]
        _Fetching(self._transport, self._stub, _id(model.name), Path(folder), progress).all(files)


class Adapters:
    """What the jobs of the caller's project made."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = ModelsServiceStub(transport.channel)

    def list(self) -> Iterator[pb.Adapter]:
        request = pb.ListAdaptersRequest(parent=self._project)
        return pages(self._transport, self._stub.ListAdapters, request, "adapters")

    def get(self, name: str) -> pb.Adapter:
        """Raises NotFound."""
        full = full_name(self._project, "adapters", name)
        return self._transport.call(self._stub.GetAdapter, pb.GetAdapterRequest(name=full))

    def of_model(self, model_id: str) -> pb.Adapter:
        """The adapter that clients call `ft:…`. Raises NotFound."""
        for adapter in self.list():
            if adapter.model_id == model_id:
                return adapter
        raise NotFound(f"The model {model_id!r} was not found.", reason="MODEL_NOT_FOUND")

    def fetch(
        self, adapter: pb.Adapter, folder: Path | str, *, progress: ImportProgress | None = None
    ) -> None:
        """PEFT's files of an adapter into `folder`, which is made. Raises DataLoss for other bytes than were saved."""
        fetching = _Fetching(self._transport, self._stub, adapter.model_id, Path(folder), progress)
        manifest = b"".join(fetching.pieces(_MANIFEST))
        if hashlib.sha256(manifest).hexdigest() != adapter.object.manifest_sha256:
            raise DataLoss(f"The manifest of {adapter.model_id} is not the one that was registered.")
        entries = json.loads(manifest)["files"]
        fetching.all([_Wanted(e["path"], e["size"], e["sha256"]) for e in entries if e["path"] != _OPTIMIZER])

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        full = full_name(self._project, "adapters", name)
        self._transport.call(self._stub.DeleteAdapter, pb.DeleteAdapterRequest(name=full))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file of a folder. sha256: lower-case hex."""

    path: str
    size: int
    sha256: str


class _Fetching:
    """The files of one model on their way here."""

    def __init__(
        self,
        transport: Transport,
        stub: ModelsServiceStub,
        model: str,
        root: Path,
        progress: ImportProgress | None,
    ) -> None:
        self._transport = transport
        self._stub = stub
        self._model = model
        self._root = root
        self._progress = progress

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of one file."""
        return self._transport.download(
            self._stub.DownloadModelFile,
            lambda offset: pb.DownloadModelFileRequest(model=self._model, path=path, read_offset=offset),
        )

    def all(self, files: Sequence[_Wanted]) -> None:
        """Write them; each has its name only when it is whole."""
        total, done = sum(file.size for file in files), 0
        for file in files:
            target = self._root / file.path
            if not target.resolve().is_relative_to(self._root.resolve()):
                raise DataLoss(f"{self._model} names the file {file.path!r}, which is outside its folder.")
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            digest = hashlib.sha256()
            with part.open("wb") as out:
                for data in self.pieces(file.path):
                    out.write(data)
                    digest.update(data)
                    done += len(data)
                    if self._progress is not None:
                        self._progress(file.path, done, total)
            if digest.hexdigest() != file.sha256:
                part.unlink()
                raise DataLoss(f"{file.path} of {self._model} did not come as it was stored; fetch it again.")
            part.replace(target)


class _Sending:
    """The files of one import on their way."""

    def __init__(
        self, transport: Transport, stub: ModelsServiceStub, root: Path, progress: ImportProgress | None
    ) -> None:
        self._transport = transport
        self._stub = stub
        self._root = root
        self._progress = progress

    def all(self, model: pb.BaseModel) -> None:
        """Send what is missing."""
        total = sum(file.size_bytes for file in model.files)
        done = sum(file.size_bytes for file in model.files if file.object_key)
        for file in model.files:
            if not file.object_key:
                self._send(model.name, file.path, done, total)
                done += file.size_bytes

    def _send(self, name: str, path: str, done: int, total: int) -> None:
        """Send one file. A stream that broke, in this process or an earlier one, is gone on with where it was."""
        patience = max(self._transport.timeout, _PATIENCE_S)
        best = -1
        # Set by the first failure since more was stored: a stream that works may last for hours.
        deadline: float | None = None
        while True:
            try:
                # Within the try: a call gives up long before the patience ends.
                offset = self._offset(name, path)
                if offset > best:
                    best, deadline = offset, None
                self._transport.send(
                    self._stub.UploadModelFile, self._messages(name, path, offset, done, total)
                )
                return
            except (Unavailable, Aborted, OutOfRange) as error:
                # Away, the broken stream not noticed yet at the other end, or stored to another point.
                if isinstance(error, Aborted) and error.reason != "UPLOAD_RUNNING":
                    raise
                deadline = deadline or time.monotonic() + patience
                pause(error, deadline)

    def _offset(self, name: str, path: str) -> int:
        if (self._root / path).stat().st_size <= CHUNK_BYTES:
            return 0
        request = pb.GetModelFileUploadRequest(base_model=name, path=path)
        try:
            return self._transport.call(self._stub.GetModelFileUpload, request).committed_size
        except Unimplemented:
            # A platform of the version before this one: it takes whole files only.
            return 0

    def _messages(
        self, name: str, path: str, offset: int, done: int, total: int
    ) -> Iterator[pb.UploadModelFileRequest]:
        with (self._root / path).open("rb") as file:
            file.seek(offset)
            done += offset
            yield pb.UploadModelFileRequest(base_model=name, path=path, write_offset=offset)
            while data := file.read(CHUNK_BYTES):
                yield pb.UploadModelFileRequest(data=data)
                done += len(data)
                if self._progress is not None:
                    self._progress(path, done, total)


def _files(root: Path) -> list[pb.ModelFile]:
    """What the folder holds; hidden files and folders are left out."""
    if not root.is_dir():
        raise InvalidArgument(f"{root} is not a folder.")
    found = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append(pb.ModelFile(path=inside.as_posix(), size_bytes=file.tell(), sha256=digest))
    return found


def _id(name: str) -> str:
    return name.rpartition("/")[2]


def _base(model_id: str) -> str:
    return model_id if "/" in model_id else f"baseModels/{model_id}"
