"""What is done with the rows of datasets: new datasets from old ones, what two share, where a row is, held-out sets."""

from __future__ import annotations

from collections.abc import Sequence

from lathe.client.names import full_name
from lathe.client.transport import Transport, new_request_id
from lathe.v1 import datasets_pb2 as pb
from lathe.v1.datasets_pb2_grpc import DatasetsServiceStub

# Rows are counted, compared and looked for while the caller waits; a large file takes its time.
_ROWS_S = 300.0


class Rows:
    """The part of `Datasets` that works with rows. What an operation makes is VALIDATING at first: see
    `Datasets.wait`."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = DatasetsServiceStub(transport.channel)

    def split(
        self,
        name: str,
        *,
        fraction: float = 0.0,
        count: int = 0,
        seed: int = 0,
        stratify_by: str = "",
    ) -> tuple[pb.Dataset, pb.Dataset]:
        """Two datasets: the rows to train on, and those held out, chosen at random.

        fraction or count: how many rows are held out. stratify_by: keep the share of each value of `answer`,
        `answer.KEY` or a path in the row. Equal rows are never parted. Raises NotFound, InvalidArgument,
        FailedPrecondition.
        """
        train, held_out = self.prepare(
            name, split_operation(fraction=fraction, count=count, seed=seed, stratify_by=stratify_by)
        )
        return train, held_out

    def dedupe(self, name: str, *, near_for: str = "", options: pb.AuditOptions | None = None) -> pb.Dataset:
        """A dataset of the first of each set of equal rows. near_for: a base model; what its audit finds to be nearly
        the same as an earlier row is left out too. Raises NotFound, FailedPrecondition."""
        (made,) = self.prepare(name, dedupe_operation(near_for, options))
        return made

    def drop(
        self,
        name: str,
        lines: Sequence[int] = (),
        *,
        codes: Sequence[str] = (),
        base_model: str = "",
        options: pb.AuditOptions | None = None,
    ) -> pb.Dataset:
        """A dataset without these lines (1-based), and without those for which the audit for a base model found one of
        these codes (docs/audit.md). Raises NotFound, InvalidArgument, FailedPrecondition."""
        (made,) = self.prepare(name, drop_operation(lines, codes, base_model, options))
        return made

    def sample(self, name: str, count: int, *, seed: int = 0) -> pb.Dataset:
        """A dataset of `count` rows, chosen at random. Raises NotFound, InvalidArgument, FailedPrecondition."""
        (made,) = self.prepare(name, pb.DatasetOperation(sample=pb.SampleRows(seed=seed, count=count)))
        return made

    def truncate(
        self,
        name: str,
        base_model: str,
        limit: int = 0,
        *,
        policy: str = "",
        keep_unfit: bool = False,
        method: str = "",
    ) -> pb.Dataset:
        """A dataset whose rows have at most `limit` tokens (0: the base model's context), longer ones made shorter.

        policy: drop_oldest (the default), cut_end or drop_row, see docs/preparation.md. keep_unfit: rows that cannot be
        made to fit stay as they are instead of being dropped. Raises NotFound, InvalidArgument, FailedPrecondition.
        """
        options = pb.AuditOptions(method=method, context_limit=limit)
        (made,) = self.prepare(name, truncate_operation(base_model, options, policy, keep_unfit=keep_unfit))
        return made

    def prepare(self, name: str, operation: pb.DatasetOperation) -> list[pb.Dataset]:
        """The datasets that an operation makes, in its order."""
        request = pb.PrepareDatasetRequest(
            name=self._name(name), operation=operation, request_id=new_request_id()
        )
        # An audit whose findings decide may have to be made first.
        answer = self._transport.call(self._stub.PrepareDataset, request, timeout=_ROWS_S)
        return [prepared.dataset for prepared in answer.prepared]

    def count(self, name: str, operation: pb.DatasetOperation) -> pb.PrepareDatasetResponse:
        """How many rows each dataset would have; nothing is made."""
        request = pb.PrepareDatasetRequest(name=self._name(name), operation=operation, dry_run=True)
        return self._transport.call(self._stub.PrepareDataset, request, timeout=_ROWS_S)

    def diff(self, name: str, other: str) -> pb.DatasetDiff:
        """Which rows two datasets share, whatever their order and spelling. Raises NotFound, FailedPrecondition."""
        request = pb.DiffDatasetsRequest(name=self._name(name), other=self._name(other))
        return self._transport.call(self._stub.DiffDatasets, request, timeout=_ROWS_S)

    def find(
        self, *, row: str = "", dataset: str = "", line: int = 0, digest: str = ""
    ) -> pb.FindRowsResponse:
        """Every training file of the project that has a row: given as JSON, as a line of a dataset, or by its digest.

        Raises NotFound, InvalidArgument, FailedPrecondition.
        """
        place = pb.DatasetLine(dataset=self._name(dataset), line=line) if dataset else None
        request = pb.FindRowsRequest(parent=self._project, row=row, line=place, digest=digest)
        return self._transport.call(self._stub.FindRows, request, timeout=_ROWS_S)

    def trained_rows(self, dataset_sha256: str, audit_key: str) -> pb.TrainedRows:
        """What a job trained on, by the digests in its model's lineage."""
        request = pb.GetTrainedRowsRequest(
            parent=self._project, dataset_sha256=dataset_sha256, audit_key=audit_key
        )
        return self._transport.call(self._stub.GetTrainedRows, request)

    def freeze(self, name: str, frozen_as: str) -> pb.Dataset:
        """Keep a dataset as a held-out set: no job trains on a file with one of its rows from now on.

        Raises NotFound, InvalidArgument, AlreadyExists for a name that another one has, FailedPrecondition.
        """
        request = pb.FreezeDatasetRequest(name=self._name(name), frozen_as=frozen_as)
        return self._transport.call(self._stub.FreezeDataset, request)

    def thaw(self, name: str) -> pb.Dataset:
        """End that; for admins. Raises NotFound, PermissionDenied."""
        return self._transport.call(self._stub.ThawDataset, pb.ThawDatasetRequest(name=self._name(name)))

    def _name(self, name: str) -> str:
        return full_name(self._project, "datasets", name)


def split_operation(
    *, fraction: float = 0.0, count: int = 0, seed: int = 0, stratify_by: str = ""
) -> pb.DatasetOperation:
    """As of `Rows.split`, for `count` and `prepare`."""
    split = pb.SplitRows(seed=seed, fraction=fraction, count=count, stratify_by=stratify_by)
    return pb.DatasetOperation(split=split)


def dedupe_operation(near_for: str = "", options: pb.AuditOptions | None = None) -> pb.DatasetOperation:
    """As of `Rows.dedupe`."""
    base_model = near_for and _base(near_for)
    return pb.DatasetOperation(
        dedupe=pb.DedupeRows(near=bool(near_for), base_model=base_model, options=options)
    )


def drop_operation(
    lines: Sequence[int],
    codes: Sequence[str] = (),
    base_model: str = "",
    options: pb.AuditOptions | None = None,
) -> pb.DatasetOperation:
    """As of `Rows.drop`."""
    base_model = base_model and _base(base_model)
    drop = pb.DropRows(lines=lines, codes=codes, base_model=base_model, options=options)
    return pb.DatasetOperation(drop=drop)


def truncate_operation(
    base_model: str, options: pb.AuditOptions | None = None, policy: str = "", *, keep_unfit: bool = False
) -> pb.DatasetOperation:
    """As of `Rows.truncate`; the limit is the options' context_limit."""
    truncate = pb.TruncateRows(
        base_model=_base(base_model), options=options, policy=policy, keep_unfit=keep_unfit
    )
    return pb.DatasetOperation(truncate=truncate)


def _base(model: str) -> str:
    return model if "/" in model else f"baseModels/{model}"
