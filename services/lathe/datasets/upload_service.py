"""The use cases of uploads in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from lathe.common.errors import FailedPrecondition, LatheError, NotFound
from lathe.datasets import uploads as rules
from lathe.datasets.model import Dataset, DatasetState
from lathe.datasets.ports import UploadStore
from lathe.datasets.service import DatasetsService
from lathe.datasets.uploads import PlannedPart, UploadSession, UploadState


@dataclass(frozen=True, slots=True)
class PartTarget:
    """Where one part goes. max_bytes: the most that it may have."""

    part_id: str
    object_key: str
    max_bytes: int


@dataclass(frozen=True, slots=True)
class SignedParts:
    """Parts and the URL of each, which work until expire_time. missing_bytes: of all that are missing."""

    parts: tuple[tuple[PlannedPart, str], ...]
    expire_time: datetime
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class UploadService:
    """Parts come in any order; `complete` says which they are, and then the dataset is like any other."""

    datasets: DatasetsService
    store: UploadStore

    async def check(self, size_bytes: int, sha256: str, *, presigned: bool) -> None:
        """Before the dataset is made. Raises InvalidArgument, and FailedPrecondition where there is no presigning."""
        rules.check_announced(size_bytes, sha256)
        if presigned:
            await self._signed("staging/probe", 1, rules.URL_LIFE)

    async def open(self, dataset: Dataset, size_bytes: int, sha256: str, *, presigned: bool) -> UploadSession:
        """The session of a dataset that was just made; the one that is there if the call is repeated."""
        life = rules.PRESIGNED_OPEN_FOR if presigned else rules.OPEN_FOR
        new = UploadSession(
            project=dataset.project,
            dataset_id=dataset.id,
            display_name=dataset.display_name,
            purpose=dataset.purpose,
            size_bytes=size_bytes,
            sha256=sha256,
            create_time=dataset.create_time,
            expire_time=dataset.create_time + life,
        )
        return await self.store.add_upload(new)

    async def get(self, project: str, dataset_id: str) -> tuple[UploadSession, Dataset | None]:
        """The session as it is now, and its dataset if that was committed. Raises NotFound."""
        session = await self.store.get_upload(project, dataset_id)
        if session is None:
            raise NotFound(f"projects/{project}/datasets/{dataset_id} has no upload in parts.")
        dataset = await self.datasets.store.get(project, dataset_id)
        state = session.state_at(self.datasets.clock.now())
        if state is UploadState.PENDING and dataset is None:
            # Its dataset was deleted.
            state = UploadState.CANCELLED
        committed = dataset if state is UploadState.COMPLETED else None
        return replace(session, state=state), committed

    async def is_in_parts(self, dataset: Dataset) -> bool:
        """Whether it takes parts, not a stream."""
        return await self.store.get_upload(dataset.project, dataset.id) is not None

    async def open_part(self, project: str, dataset_id: str) -> PartTarget:
        """Raises NotFound, FailedPrecondition when the upload is over or far too much was sent."""
        session, dataset = await self._pending(project, dataset_id)
        most = rules.next_part_bytes(session, await self._stored(dataset))
        part = self.datasets.ids.new("part")
        return PartTarget(part, f"{dataset.staging_key}/{part}", most)

    async def sign(self, project: str, dataset_id: str) -> SignedParts:
        """URLs for missing parts. Raises NotFound, FailedPrecondition when the upload is over, nothing is signed or far
        too much was sent."""
        session, dataset = await self._pending(project, dataset_id)
        stored = await self._stored(dataset)
        rules.check_stored(session, stored)
        now = self.datasets.clock.now()
        expire_time = min(now + rules.URL_LIFE, session.expire_time)
        # S3 signs for whole seconds, and for one at least.
        life = max(expire_time - now, timedelta(seconds=1))
        left = rules.missing(session, stored)
        signed = [
            (part, await self._signed(f"{dataset.staging_key}/{part.name}", part.size, life))
            for part in left[: rules.MAX_SIGNED]
        ]
        return SignedParts(tuple(signed), expire_time, sum(part.size for part in left))

    async def complete(
        self, project: str, dataset_id: str, part_ids: Sequence[str], md5: str = "", sha256: str = ""
    ) -> tuple[UploadSession, Dataset | None]:
        """The dataset is VALIDATING at once; the digests are checked there. Repeating it answers the same.

        Raises NotFound, InvalidArgument for wrong parts or a digest that was announced otherwise, FailedPrecondition
        when the upload is over.
        """
        md5 = rules.check_md5(md5)
        session, _ = await self.get(project, dataset_id)
        sha256 = rules.agreed_sha256(session, sha256)
        if session.state is UploadState.PENDING:
            await self._complete(replace(session, md5=md5, sha256=sha256), part_ids)
        session, committed = await self.get(project, dataset_id)
        same = not part_ids or tuple(part_ids) == session.parts
        same = same and (md5, sha256) == (session.md5, session.sha256)
        if session.state is not UploadState.COMPLETED or not same:
            raise rules.not_pending(session, session.state)
        if committed is None:
            raise NotFound(f"{session.name} was deleted after its upload.")
        return session, committed

    async def _complete(self, session: UploadSession, part_ids: Sequence[str]) -> None:
        """With the session's digests. Unless somebody was quicker, after whom the parts may be gone too: what the row
        says then is what counts."""
        try:
            dataset = await self._uploading(session)
            parts = rules.ordered(session, part_ids, await self._stored(dataset))
        except LatheError:
            now, _ = await self.get(session.project, session.dataset_id)
            if now.state is UploadState.PENDING:
                raise
            return
        if await self.store.complete_upload(replace(session, parts=parts), self.datasets.clock.now()):
            self.datasets.validation.set()

    async def cancel(self, project: str, dataset_id: str) -> UploadSession:
        """Raises NotFound, FailedPrecondition when it is complete or has expired."""
        await self.store.cancel_upload(project, dataset_id, self.datasets.clock.now())
        session, _ = await self.get(project, dataset_id)
        if session.state is not UploadState.CANCELLED:
            raise rules.not_pending(session, session.state)
        self.datasets.cleanup.set()
        return session

    async def _pending(self, project: str, dataset_id: str) -> tuple[UploadSession, Dataset]:
        session, _ = await self.get(project, dataset_id)
        if session.state is not UploadState.PENDING:
            raise rules.not_pending(session, session.state)
        return session, await self._uploading(session)

    async def _uploading(self, session: UploadSession) -> Dataset:
        dataset = await self.datasets.get(session.project, session.dataset_id)
        if dataset.state is not DatasetState.UPLOADING:
            raise rules.not_pending(session, UploadState.COMPLETED)
        return dataset

    async def _stored(self, dataset: Dataset) -> dict[str, int]:
        prefix = f"{dataset.staging_key}/"
        return {info.key.removeprefix(prefix): info.size async for info in self.datasets.objects.list(prefix)}

    async def _signed(self, key: str, size: int, life: timedelta) -> str:
        url = await self.datasets.objects.presigned_put(key, size, life)
        if url is None:
            raise FailedPrecondition(
                "Parts cannot be sent straight to this platform's store, because clients do not reach it. Create the "
                "dataset without in_parts and send the file with UploadDataset.",
                reason="NO_PRESIGNED_PARTS",
            )
        return url
