"""What datasets needs from outside, beside the object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from lathe.datasets.model import (
    Audit,
    AuditResult,
    AuditState,
    AuditTask,
    BaseModelInfo,
    Dataset,
    DatasetState,
    Overlap,
    Report,
)
from lathe.datasets.uploads import UploadSession

Awaited = Literal["import", "validation", "audit"]
"""What is done in the background and somebody waits for."""


class DatasetStore(Protocol):
    """The datasets and audits that are kept. What is being deleted is never returned by `get` and `page`."""

    async def add(self, dataset: Dataset, request_key: str) -> Dataset:
        """Keep a new one, or answer with the one that the same non-empty request_key made in its project."""
        ...

    async def add_all(self, new: Sequence[tuple[Dataset, str]]) -> bool:
        """Keep new ones, each with its request_key, together; False, and none is kept, where one of the keys made a
        dataset before."""
        ...

    async def get(self, project: str, dataset_id: str) -> Dataset | None: ...

    async def find_by_request(self, project: str, request_key: str) -> Dataset | None: ...

    async def page(
        self, project: str, *, purpose: str, after: tuple[datetime, str] | None, ascending: bool, limit: int
    ) -> Sequence[Dataset]:
        """By (create_time, id), the ones after `after` in that order; every purpose for an empty one."""
        ...

    async def in_state(self, state: DatasetState) -> Sequence[Dataset]:
        """All of that state, oldest first; also those being deleted."""
        ...

    async def with_leftovers(self) -> Sequence[Dataset]:
        """READY and ERROR ones whose staging has not been cleared yet."""
        ...

    async def outlived(self, now: datetime, abandoned_before: datetime) -> Sequence[Dataset]:
        """Those whose expire_time has come, and those UPLOADING since before `abandoned_before`, except for imports
        that are still to be fetched."""
        ...

    async def count(self) -> Mapping[DatasetState, int]:
        """How many there are in each state."""
        ...

    async def count_audits(self) -> Mapping[AuditState, int]:
        """How many there are in each state; comparisons of two are audits too."""
        ...

    async def waiting_since(self) -> Mapping[Awaited, datetime | None]:
        """Since when the oldest of each is asked for that is not done; None where there is none. For an import or a
        validation that is the time when the dataset was made."""
        ...

    async def begin_validation(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        """UPLOADING -> VALIDATING; a results file that is VALIDATING gets new facts. False from any other state."""
        ...

    async def staged_parts(self, project: str, dataset_id: str) -> tuple[Sequence[str], str]:
        """The names of its parts in the order of the file, and the MD5 that was announced; ((), "") for a dataset that
        was not uploaded in parts with names."""
        ...

    async def note_digest(self, project: str, dataset_id: str, sha256: str) -> bool:
        """Say which blob a VALIDATING one is about to need; False if it is not VALIDATING any more."""
        ...

    async def note_conversion(
        self, project: str, dataset_id: str, stored: tuple[str, int], uploaded: tuple[str, int]
    ) -> bool:
        """The same for one that is converted, with what was uploaded beside it; each is digest and size. The digest of
        what is stored is empty where nothing is. False if it is not VALIDATING any more."""
        ...

    async def finish_validation(
        self, project: str, dataset_id: str, state: DatasetState, sha256: str, report: Report | None
    ) -> bool:
        """VALIDATING -> READY or ERROR; False if it is not VALIDATING any more."""
        ...

    async def clear_staging(self, project: str, dataset_id: str) -> None:
        """Note that nothing is left in staging."""
        ...

    async def begin_delete(self, project: str, dataset_id: str) -> bool:
        """Any state -> DELETING; False if there is none, or if it is frozen."""
        ...

    async def remove(self, project: str, dataset_id: str) -> None:
        """Forget a DELETING one."""
        ...

    async def claim_blob(self, sha256: str, owner: str, holder: str, now: datetime) -> bool:
        """Announce that the call `holder` is about to delete this blob on account of `owner`.

        False if another call is at it, or if a dataset that is not being deleted, or an audit, needs it. A claim
        that is older than CLAIM_LEASE is taken over.
        """
        ...

    async def release_blob(self, sha256: str, holder: str) -> None:
        """The deletion is done."""
        ...

    async def left_claims(self, now: datetime) -> Sequence[tuple[str, str]]:
        """(sha256, owner) of the claims that no call works on: of removed audits, and of calls that broke off."""
        ...

    async def unnamed(self, digests: Sequence[str]) -> set[str]:
        """Those that no dataset, audit or claim names. digests: 500 at most."""
        ...

    async def unnamed_staging(self, keys: Sequence[str]) -> set[str]:
        """Those that are no dataset's staging key. keys: 500 at most."""
        ...

    async def is_claimed(self, sha256: str) -> bool:
        """Whether somebody is about to delete this blob."""
        ...

    # --- rows

    async def training_files(self, project: str) -> Sequence[Dataset]:
        """READY ones of purpose fine-tune, oldest first."""
        ...

    async def to_index(self, version: int) -> Sequence[str]:
        """Digests of READY training files whose row index is not of this version, smallest first."""
        ...

    async def set_indexed(self, sha256: str, version: int) -> bool:
        """Note that the row index is stored; False if no READY training file has this digest."""
        ...

    async def unset_indexed(self, sha256: str) -> bool:
        """Note that there is no row index and one is to be made; False if no READY training file has this digest."""
        ...

    async def unwritten(self) -> Sequence[Dataset]:
        """VALIDATING ones that are still to be written, oldest first."""
        ...

    async def set_written(self, project: str, dataset_id: str, size_bytes: int, sha256: str) -> bool:
        """An unwritten one is now in staging; False if it is not unwritten any more."""
        ...

    async def freeze(self, project: str, dataset_id: str, name: str) -> bool:
        """A READY one gets its name as a held-out set and never expires; True as well where it has that name.

        False from any other state, and if it has another name. Raises AlreadyExists if another one has the name.
        """
        ...

    async def thaw(self, project: str, dataset_id: str) -> None:
        """Take the name away."""
        ...

    async def frozen(self, project: str) -> Sequence[Dataset]:
        """The held-out sets, by name."""
        ...

    async def overlap(self, frozen_sha256: str, dataset_sha256: str) -> Overlap:
        """What is known; a pair that nobody asked about before is kept as one to look at."""
        ...

    async def overlaps_to_find(self) -> Sequence[Overlap]:
        """Those that have no count yet."""
        ...

    async def set_overlap(self, overlap: Overlap) -> None:
        """Keep what was found."""
        ...

    async def forget_overlaps(self) -> None:
        """Remove those of files that no dataset has any more."""
        ...

    # --- audits

    async def add_audit(self, task: AuditTask) -> None:
        """Keep a RUNNING audit unless its key is there; nothing happens then."""
        ...

    async def get_audit(self, key: str, now: datetime) -> Audit | None:
        """It counts as used now."""
        ...

    async def use_tokens(self, digests: Sequence[str], now: datetime) -> None:
        """The audits that made these token objects count as used now. digests: any number."""
        ...

    async def is_audit_of(self, key: str, dataset_sha256: str) -> bool:
        """Whether there is an audit with this key, and of a dataset with this digest."""
        ...

    async def audit_task(self, key: str) -> AuditTask | None:
        """What an audit in any state was asked for; None if there is none."""
        ...

    async def running_audits(self) -> Sequence[AuditTask]:
        """Oldest first."""
        ...

    async def begin_audit(self, key: str) -> int:
        """Count that a RUNNING audit is begun: how often it was so without an end. 0 if it is not RUNNING."""
        ...

    async def end_audit_try(self, key: str) -> None:
        """Note that what was begun ended without an outcome, but as it should."""
        ...

    async def set_audit_objects(self, key: str, sha256: str, findings_sha256: str) -> None:
        """Note, before the objects are written, which blobs a RUNNING audit needs; empty for none."""
        ...

    async def finish_audit(self, key: str, state: AuditState, report: Report, result: AuditResult) -> None:
        """RUNNING -> READY, ERROR or FAILED; another state stays."""
        ...

    async def forget_failed_audits(
        self,
        *,
        begins: int | None = None,
        unused_since: datetime | None = None,
        dataset_sha256: str | None = None,
    ) -> None:
        """Remove FAILED ones, so that they are tried again when somebody asks: those that were begun less often, for
        which nobody asked since, and of datasets with this digest; of all if not given."""
        ...

    async def drop_running_audit(self, key: str) -> None:
        """Forget a RUNNING audit, and claim its blobs if it has some by now."""
        ...

    async def unneeded_audits(self, unused_since: datetime) -> Sequence[str]:
        """Keys of finished audits that no dataset stands for and nobody used since."""
        ...

    async def begin_remove_audit(self, key: str, unused_since: datetime) -> None:
        """Forget an audit if it is still unneeded, and claim its blobs in the same moment."""
        ...


class UploadStore(Protocol):
    """The uploads in parts that are kept, each by its dataset."""

    async def add_upload(self, session: UploadSession) -> UploadSession:
        """Keep a new one, or answer with the one that its dataset has."""
        ...

    async def get_upload(self, project: str, dataset_id: str) -> UploadSession | None:
        """As it was written: whether its time has come is the caller's question."""
        ...

    async def complete_upload(self, session: UploadSession, now: datetime) -> bool:
        """PENDING -> COMPLETED, with the session's parts and digests, and its dataset UPLOADING -> VALIDATING, both or
        neither (False)."""
        ...

    async def cancel_upload(self, project: str, dataset_id: str, now: datetime) -> bool:
        """PENDING -> CANCELLED and its dataset DELETING; False if it is not PENDING or has expired."""
        ...

    async def expire_uploads(self, now: datetime) -> None:
        """Every PENDING one whose time has come -> EXPIRED, its dataset DELETING."""
        ...

    async def forget_uploads(self, expired_before: datetime) -> None:
        """Remove those whose time came before then and that no validation needs any more."""
        ...


@dataclass(frozen=True, slots=True)
class Import:
    """A dataset that is being fetched. staging_key: where this try's bytes go, and by which it is known whether the
    dataset is still this try's. earlier_key: where those of the try before went, which nobody needs any more. tries:
    those that broke."""

    project: str
    dataset_id: str
    source: str
    tries: int
    staging_key: str
    earlier_key: str


class ImportStore(Protocol):
    """The imports of datasets that are UPLOADING. Each is one try's at a time; what a try has to say once another has
    taken the dataset over, or it is UPLOADING no more, changes nothing and is answered with False."""

    async def begin(self, project: str, dataset_id: str, source: str, now: datetime) -> None:
        """Keep one, due now; nothing happens if there is one of that dataset."""
        ...

    async def take(self, staging_key: str, now: datetime, until: datetime) -> Import | None:
        """One that is due becomes a new try's, with this staging_key, and due again `until` then: of the project that
        has the fewest under way (or waiting for another try), the one that is due longest."""
        ...

    async def keep(self, item: Import, until: datetime) -> bool:
        """The try goes on."""
        ...

    async def again(self, item: Import, tries: int, next_time: datetime) -> bool:
        """It broke; when the next try is due."""
        ...

    async def finish(self, item: Import, size_bytes: int, sha256: str) -> bool:
        """What was fetched is in staging: the dataset UPLOADING -> VALIDATING."""
        ...

    async def fail(self, item: Import, report: Report) -> bool:
        """The dataset UPLOADING -> ERROR."""
        ...

    async def forget_ended(self) -> None:
        """Remove those whose dataset is UPLOADING no more."""
        ...


class BaseModels(Protocol):
    """The models service."""

    async def resolve(self, project: str, base_model: str) -> BaseModelInfo:
        """Raises NotFound, and Unavailable while models is away."""
        ...
