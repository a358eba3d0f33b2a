"""Files of examples: uploaded resumably, validated by the platform, immutable afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lathe.client.audits import Audits
from lathe.client.content import Content, ContentDigest
from lathe.client.paging import pages
from lathe.client.parts import PartsUpload, StoreOutOfReach
from lathe.client.rows import Rows
from lathe.client.transport import Transport, new_request_id, pause
from lathe.common.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    OutOfRange,
    Unavailable,
    Unimplemented,
)
from lathe.v1 import datasets_pb2 as pb
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub

# Below it one stream is quicker than the calls about parts.
PRESIGNED_FROM_BYTES = 8 * 1024 * 1024
_SETTLED = frozenset({pb.DATASET_STATE_READY, pb.DATASET_STATE_ERROR})

# (bytes sent so far, bytes altogether)
Progress = Callable[[int, int], None]


class Datasets(Rows, Audits):
    """The datasets of the caller's project."""

    def upload(
        self,
        source: Path | str | bytes,
        purpose: str = "fine-tune",
        *,
        display_name: str = "",
        file_type: str = "",
        columns: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> pb.Dataset:
        """Upload a file (a path) or its bytes; the answer is VALIDATING or further, see `wait`.

        A large file goes in parts straight to the object store, where the platform offers that and the store can be
        reached from here. A connection that breaks is made again and the upload goes on where it was, until there was
        no progress for the client's timeout. progress: called with (sent, all) bytes.
        A training file that is not JSONL is converted. file_type: jsonl, json, csv or parquet; by the name's ending if
        not given. columns: key of a training row -> column of the file, such as {"prompt": "question"}.
        Raises InvalidArgument for a file that cannot be read, is too large, changes meanwhile, or is of an unknown
        purpose, type or key.
        """
        content = Content.of(source)
        digest = ContentDigest(content)
        new = pb.Dataset(display_name=display_name or content.name, purpose=purpose)
        if file_type or columns:
            new.import_options.CopyFrom(pb.ImportOptions(file_type=file_type, columns=columns))
        if content.size >= PRESIGNED_FROM_BYTES:
            done = self._in_parts(digest, new, progress)
            if done is not None:
                return done
        created = self._create(new)
        with self._forgotten_if_refused(created.name):
            return _Upload(self._transport, self._stub, created.name, digest, progress).run()

    def import_from(
        self,
        source: str,
        purpose: str = "fine-tune",
        *,
        display_name: str = "",
        file_type: str = "",
        columns: Mapping[str, str] | None = None,
    ) -> pb.Dataset:
        """Have the platform fetch a file; the answer is UPLOADING, see `wait`.

        source: an https:// or http:// URL, s3://bucket/key, or hf:owner/name[:config/split]. file_type, columns: as in
        `upload`. Raises InvalidArgument, FailedPrecondition where imports are switched off.
        """
        new = pb.Dataset(display_name=display_name, purpose=purpose)
        if file_type or columns:
            new.import_options.CopyFrom(pb.ImportOptions(file_type=file_type, columns=columns))
        request = pb.ImportDatasetRequest(
            parent=self._project, dataset=new, source=source, request_id=new_request_id()
        )
        return self._transport.call(self._stub.ImportDataset, request)

    def _in_parts(
        self, digest: ContentDigest, new: pb.Dataset, progress: Progress | None
    ) -> pb.Dataset | None:
        """Straight to the object store; None where that is not offered, or the store is out of this client's reach."""
        content = digest.content
        announced = pb.PartsAnnouncement(size_bytes=content.size, presigned=True)
        try:
            created = self._create(new, announced)
        except FailedPrecondition as error:
            if error.reason != "NO_PRESIGNED_PARTS":
                raise
            return None

        def stored(size: int) -> None:
            if progress is not None:
                progress(size, content.size)

        try:
            with self._forgotten_if_refused(created.name):
                return PartsUpload(self._transport, self._stub, created.name, digest, stored).run()
        except (StoreOutOfReach, Unimplemented):
            # Or the platform is of the version before, which made a dataset for a stream.
            self.delete(created.name)
            return None

    @contextmanager
    def _forgotten_if_refused(self, name: str) -> Iterator[None]:
        """What cannot be read any more, changed meanwhile or is too large leaves no dataset that waits for the rest."""
        try:
            yield
        except InvalidArgument:
            with suppress(LatheError):
                self.delete(name)
            raise

    def _create(self, new: pb.Dataset, in_parts: pb.PartsAnnouncement | None = None) -> pb.Dataset:
        request = pb.CreateDatasetRequest(
            parent=self._project,
            dataset=new,
            request_id=new_request_id(),
            in_parts=in_parts,
        )
        return self._transport.call(self._stub.CreateDataset, request)

    def wait(self, name: str, *, timeout: float = 600.0) -> pb.Dataset:
        """The dataset once it is READY or ERROR (its `report` then says what is wrong, by line).

        Raises NotFound, DeadlineExceeded.
        """
        deadline = time.monotonic() + timeout
        pause = 0.05
        while True:
            dataset = self.get(name)
            if dataset.state in _SETTLED:
                return dataset
            if time.monotonic() + pause > deadline:
                raise DeadlineExceeded(f"{dataset.name} was not validated within {timeout:.0f} seconds.")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def get(self, name: str) -> pb.Dataset:
        """Raises NotFound."""
        return self._transport.call(self._stub.GetDataset, pb.GetDatasetRequest(name=self._name(name)))

    def list(self, purpose: str = "") -> Iterator[pb.Dataset]:
        """Newest first; only those of one purpose, when given."""
        request = pb.ListDatasetsRequest(parent=self._project, purpose=purpose)
        return pages(self._transport, self._stub.ListDatasets, request, "datasets")

    def download(self, name: str) -> Iterator[bytes]:
        """The bytes as they are stored, piece by piece; a connection that breaks is made again.

        Raises NotFound, FailedPrecondition while the dataset is not ready.
        """
        name = self._name(name)
        return self._transport.download(
            self._stub.DownloadDataset,
            lambda offset: pb.DownloadDatasetRequest(name=name, read_offset=offset),
        )

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        self._transport.call(self._stub.DeleteDataset, pb.DeleteDatasetRequest(name=self._name(name)))


class _Upload:
    """One upload with its resumptions."""

    def __init__(
        self,
        transport: Transport,
        stub: DatasetsServiceStub,
        name: str,
        digest: ContentDigest,
        progress: Progress | None,
    ) -> None:
        self._transport = transport
        self._stub = stub
        self._name = name
        self._content = digest.content
        self._digest = digest
        self._progress = progress
        # Why the last stream was left unfinished: gRPC would only log what its iterator raises.
        self._refused: InvalidArgument | None = None

    def run(self) -> pb.Dataset:
        best, offset = 0, 0
        # Set by the first failure since more was stored: a stream that works may last for hours.
        deadline: float | None = None
        while True:
            try:
                answer = self._transport.send(self._stub.UploadDataset, self._messages(offset))
                if self._refused is not None:
                    raise self._refused
                return answer
            except InvalidArgument as error:
                # Without its first message a stream names no dataset.
                raise self._refused or error from None
            except FailedPrecondition as error:
                return self._completed(error)
            except (Unavailable, Aborted, OutOfRange) as error:
                # Away, the broken stream not noticed yet at the other end, or stored to another point.
                if isinstance(error, Aborted) and error.reason != "UPLOAD_RUNNING":
                    raise
                deadline = deadline or time.monotonic() + self._transport.timeout
                pause(error, deadline)
            try:
                request = pb.GetDatasetUploadRequest(name=self._name)
                offset = self._transport.call(self._stub.GetDatasetUpload, request).committed_size
            except FailedPrecondition as error:
                return self._completed(error)
            if offset > best:
                best, deadline = offset, None

    def _completed(self, error: FailedPrecondition) -> pb.Dataset:
        """The dataset, if what the platform has is what we sent and only its answer was lost."""
        if error.reason != "UPLOAD_COMPLETE":
            raise error
        request = pb.GetDatasetRequest(name=self._name)
        dataset = self._transport.call(self._stub.GetDataset, request)
        if self._digest.hexdigest() not in (dataset.sha256, dataset.source_sha256):
            raise error
        return dataset

    def _messages(self, offset: int) -> Iterator[pb.UploadDatasetRequest]:
        name = self._name
        try:
            for data, last in self._pieces(offset):
                self._digest.add(offset, data)
                if last:
                    self._content.check_unchanged()
                yield pb.UploadDatasetRequest(
                    name=name,
                    write_offset=offset,
                    data=data,
                    finish_write=last,
                    sha256=self._digest.hexdigest() if last else "",
                )
                name, offset = "", offset + len(data)
                if self._progress is not None:
                    self._progress(offset, self._content.size)
        except InvalidArgument as error:
            self._refused = error

    def _pieces(self, offset: int) -> Iterator[tuple[bytes, bool]]:
        """The bytes from `offset`, and whether they are the last: an empty piece where none are left."""
        for data in self._content.pieces(offset):
            offset += len(data)
            last = offset >= self._content.size
            yield data, last
            if last:
                return
        yield b"", True
