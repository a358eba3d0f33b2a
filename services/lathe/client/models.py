"""Base models that operators import, and the adapters that jobs made."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lathe.client.names import full_name
from lathe.client.paging import pages
from lathe.client.transport import Transport, new_request_id, pause
from lathe.common.errors import (
    Aborted,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
    Unimplemented,
)
from lathe.v1 import models_pb2 as pb
from lathe.v1.models_pb2_grpc import ModelsServiceStub

CHUNK_BYTES = 1024 * 1024
_COMMIT_S = 600.0
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

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        full = full_name(self._project, "adapters", name)
        self._transport.call(self._stub.DeleteAdapter, pb.DeleteAdapterRequest(name=full))


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


def _base(model_id: str) -> str:
    return model_id if "/" in model_id else f"baseModels/{model_id}"
