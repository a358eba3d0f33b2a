"""The use cases of preparation: new datasets from old ones, what two have in common, where a row is, held-out sets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from lathe.common.errors import FailedPrecondition, NotFound, Unavailable
from lathe.datasets import model as rules
from lathe.datasets.differences import MAX_FIRST, Difference, difference
from lathe.datasets.model import Audit, AuditState, Dataset, DatasetState, blob_key
from lathe.datasets.operations import (
    Operation,
    Parent,
    Preparation,
    Truncate,
    audit_of,
    check_operation,
    check_parts,
    check_size,
    name_of,
    parts_of,
    with_audit,
    with_frozen,
)
from lathe.datasets.preparing import selected
from lathe.datasets.rowindexes import RowIndexes
from lathe.datasets.selection import counts
from lathe.datasets.service import DatasetsService
from lathe.datasets.truncation import Truncations
from lathe.text.errors import RowError
from lathe.text.rowindex import DIGEST_BYTES, RowIndex, row_digest
from lathe.text.rows import parse_line


@dataclass(frozen=True, slots=True)
class Prepared:
    """One of the datasets that an operation makes. rows, and of them those that were made shorter and those that are
    longer than the limit still: counted by a dry run. dataset: None for a dry run."""

    part: str
    rows: int = 0
    dataset: Dataset | None = None
    shortened: int = 0
    unfit: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Where a dataset has a row: how often, and the first lines."""

    dataset: Dataset
    count: int
    first_lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """row: its bytes as they stand in the first place; empty without one, and where it is longer than
    MAX_FOUND_BYTES."""

    digest: bytes
    row: bytes
    places: tuple[Places, ...]


@dataclass(frozen=True, slots=True)
class PreparationService:
    """What is done with rows, beside what DatasetsService does with files."""

    datasets: DatasetsService
    indexes: RowIndexes
    truncations: Truncations
    # What takes memory for every row is done for one caller at a time.
    _alone: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def count(self, project: str, dataset_id: str, operation: Operation) -> tuple[int, list[Prepared]]:
        """The parent's rows, and those of each dataset that the operation would make; nothing is made.

        Raises NotFound, InvalidArgument, FailedPrecondition, and Unavailable while the rows are being indexed.
        """
        parent = await self._rows_of(project, dataset_id)
        operation = await self._settled(parent, operation)
        if isinstance(operation, Truncate):
            return await self._count_truncated(parent, operation)
        async with self._alone:
            selection = await selected(operation, self.indexes, parent.sha256)
        rows = counts(operation, selection)
        parts = zip(parts_of(operation), rows, strict=True)
        return len(selection), [Prepared(part, number) for part, number in parts]

    async def _count_truncated(self, parent: Dataset, operation: Truncate) -> tuple[int, list[Prepared]]:
        async with self._alone:
            done = await self.truncations.begun(operation)
            async for _ in self.truncations.rows(done, parent.sha256):
                pass
        check_parts(operation, (done.rows - done.dropped,))
        return done.rows, [Prepared("", done.rows - done.dropped, shortened=done.shortened, unfit=done.unfit)]

    async def prepare(
        self, project: str, dataset_id: str, operation: Operation, request_id: str
    ) -> list[Prepared]:
        """New datasets, VALIDATING; they are written in the background and expire when the parent does. The same
        request_id again answers with the first ones. Raises NotFound, InvalidArgument (also for the request_id of
        another kind of operation), FailedPrecondition.
        """
        parent = await self._rows_of(project, dataset_id)
        operation = await self._settled(parent, operation)
        preparation = Preparation((Parent(parent.id, parent.sha256),), operation, "")
        new = [self._derived(parent, replace(preparation, part=part)) for part in parts_of(operation)]
        # The first dataset's is the same for every kind of operation: no request_id is of two kinds.
        others = parts_of(operation)[1:]
        keys = [rules.request_key(f"prepare-{part}", request_id) for part in ("", *others)]
        # Together: half a split must not be all that a process leaves that ends here.
        if not await self.datasets.store.add_all(list(zip(new, keys, strict=True))):
            new = await self._repeated(new, keys)
        self.datasets.preparing.set()
        return [Prepared(part, dataset=each) for part, each in zip(parts_of(operation), new, strict=True)]

    def _derived(self, parent: Dataset, preparation: Preparation) -> Dataset:
        return Dataset(
            project=parent.project,
            id=self.datasets.ids.new("file"),
            display_name=rules.derived_name(
                parent.display_name, name_of(preparation.operation), preparation.part
            ),
            purpose=parent.purpose,
            state=DatasetState.VALIDATING,
            create_time=self.datasets.clock.now(),
            expire_time=parent.expire_time,
            staging_key=f"staging/{self.datasets.ids.token(24)}",
            preparation=preparation,
        )

    async def _repeated(self, new: Sequence[Dataset], keys: Sequence[str]) -> list[Dataset]:
        """What an earlier call made, and what has been deleted of it anew, of the same operation: its parts belong
        together, whatever this call means. Raises InvalidArgument where the earlier one was of another kind."""
        store, project = self.datasets.store, new[0].project
        found = [await store.find_by_request(project, key) for key in keys]
        meant = next((each.preparation for each in found if each is not None), None)
        asked = new[0].preparation
        if meant is not None and asked is not None and name_of(meant.operation) != name_of(asked.operation):
            raise rules.invalid(
                "request_id",
                f"request_id was used for another operation ({name_of(meant.operation)}); take a new one for "
                f"{name_of(asked.operation)}.",
            )
        made = []
        for dataset, key in zip(new, keys, strict=True):
            own = dataset.preparation
            as_meant = replace(meant, part=own.part) if meant is not None and own is not None else own
            made.append(await store.add(replace(dataset, preparation=as_meant), key))
        return made

    async def diff(self, project: str, dataset_id: str, other_id: str) -> Difference:
        """Raises NotFound, FailedPrecondition, and Unavailable while the rows are being indexed."""
        one, other = await self._rows_of(project, dataset_id), await self._rows_of(project, other_id)
        async with (
            self._alone,
            self.indexes.opened(one.sha256) as first,
            self.indexes.opened(other.sha256) as second,
        ):
            return await asyncio.to_thread(difference, first, second)

    # --- where a row is ---------------------------------------------------------------------------------------

    async def find_row(self, project: str, row: bytes) -> Found:
        """Every training file of the project that has an equal of this row. Raises InvalidArgument for what is no
        training row, and Unavailable while rows are being indexed."""
        try:
            return await self.find_digest(project, row_digest(parse_line(row)))
        except RowError as error:
            raise rules.invalid(
                "row", f"row is no training row: {f'{error.field}: ' if error.field else ''}{error.detail}."
            ) from error

    async def find_line(self, project: str, dataset_id: str, line: int) -> Found:
        """The same for a line of a dataset. Raises NotFound as well where it has no row."""
        dataset = await self._rows_of(project, dataset_id)
        async with self.indexes.opened(dataset.sha256) as index:
            entry = index.at_line(line)
        if entry is None:
            raise NotFound(f"{dataset.name} has no row on line {line}.", reason="NO_SUCH_LINE")
        return await self.find_digest(project, entry.digest)

    async def find_digest(self, project: str, digest: bytes) -> Found:
        """The same for a digest."""
        wanted = pa.array([digest], pa.binary(DIGEST_BYTES))
        # Files with the same content have their rows on the same lines.
        known: dict[str, tuple[int, tuple[int, ...]]] = {}
        row, places = b"", []
        for dataset in await self.datasets.store.training_files(project):
            if dataset.sha256 not in known:
                async with self.indexes.opened(dataset.sha256) as index:
                    positions = await asyncio.to_thread(_positions, index, wanted)
                    lines = tuple(index.entry(position).line for position in positions[:MAX_FIRST])
                    known[dataset.sha256] = len(positions), lines
                    if positions and not row:
                        row = await self._row(dataset, index, positions[0])
            count, lines = known[dataset.sha256]
            if count:
                places.append(Places(dataset, count, lines))
        return Found(digest, row, tuple(places))

    async def _row(self, dataset: Dataset, index: RowIndex, position: int) -> bytes:
        entry = index.entry(position)
        if entry.length > rules.MAX_FOUND_BYTES:
            return b""
        chunks = self.indexes.objects.stream(
            blob_key(dataset.sha256), offset=entry.offset, length=entry.length
        )
        return b"".join([chunk async for chunk in chunks])

    async def trained_rows(
        self, project: str, sha256: str, audit_key: str
    ) -> tuple[list[Dataset], Audit | None]:
        """The project's datasets with these bytes, oldest first, and the audit of them with this key. None for an
        audit of other bytes, of bytes that the project has not (or no more), and for one that has gone."""
        found = [each for each in await self.datasets.store.training_files(project) if each.sha256 == sha256]
        if not found or not await self.datasets.store.is_audit_of(audit_key, sha256):
            return found, None
        return found, await self.datasets.store.get_audit(audit_key, self.datasets.clock.now())

    # --- held-out sets ----------------------------------------------------------------------------------------

    async def freeze(self, project: str, dataset_id: str, name: str) -> Dataset:
        """Keep a dataset as a held-out set, for good. Raises NotFound, InvalidArgument, AlreadyExists for a name that
        another one has, FailedPrecondition for a dataset that has another name or no training rows."""
        rules.check_frozen_name(name)
        dataset = await self._rows_of(project, dataset_id)
        if not await self.datasets.store.freeze(project, dataset_id, name):
            dataset = await self._rows_of(project, dataset_id)
            raise FailedPrecondition(
                f"{dataset.name} is frozen as {dataset.frozen_as!r}; that is its name.", reason="FROZEN"
            )
        return await self.datasets.get(project, dataset_id)

    async def thaw(self, project: str, dataset_id: str) -> Dataset:
        """Let it be an ordinary dataset again. Raises NotFound."""
        dataset = await self.datasets.get(project, dataset_id)
        await self.datasets.store.thaw(project, dataset.id)
        return await self.datasets.get(project, dataset_id)

    async def _settled(self, parent: Dataset, operation: Operation) -> Operation:
        """The operation with the key of the audit that it asks about. Raises InvalidArgument for one that cannot be
        meant, or not of so many rows, FailedPrecondition where there can be no audit, Unavailable until it is there."""
        check_operation(operation)
        if parent.report is not None:
            check_size(operation, parent.report.example_count)
        choice = audit_of(operation)
        if choice is None:
            return operation
        options = rules.AuditOptions(choice.method, choice.context_limit, choice.truncation)
        audit = await self.datasets.ensure_audit(
            parent.project, parent.id, choice.base_model, options, held_out=True
        )
        if audit.state is AuditState.RUNNING:
            raise Unavailable(
                f"{parent.name} is being audited. Try again in a moment.",
                reason="AUDIT_RUNNING",
                retry_after=1,
            )
        if not audit.findings_key:
            why = audit.report.findings[0].message if audit.report.findings else "it has no findings by line"
            raise FailedPrecondition(f"{parent.name} cannot be audited: {why}", reason="NOT_AUDITED")
        frozen = [each.sha256 for each in await self.datasets.store.frozen(parent.project)]
        return with_frozen(with_audit(operation, replace(choice, key=audit.key)), frozen)

    async def _rows_of(self, project: str, dataset_id: str) -> Dataset:
        dataset = await self.datasets.get(project, dataset_id)
        rules.check_rows(dataset)
        return dataset


def _positions(index: RowIndex, digests: Any) -> list[int]:
    return list(index.positions_of(digests))
