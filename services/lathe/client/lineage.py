"""Which rows trained a model, and which models saw a row: joined here from what each service knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lathe.client.datasets import Datasets
from lathe.client.jobs import ENDED, Jobs
from lathe.client.models import Adapters
from lathe.common.errors import NotFound
from lathe.v1 import datasets_pb2, jobs_pb2, models_pb2

_READY = datasets_pb2.DATASET_STATE_READY


@dataclass(frozen=True, slots=True)
class Training:
    """One job of those that a model is made of. job: None once it is gone. rows: what it trained on."""

    adapter: models_pb2.Adapter
    job: jobs_pb2.Job | None
    rows: datasets_pb2.TrainedRows


@dataclass(frozen=True, slots=True)
class ModelLineage:
    """trainings: the jobs that made a model, its own first, then that of the model which it goes on from, and so on.
    missing_parent: the model id at which the chain breaks off because it was deleted; empty if it reaches the base."""

    trainings: tuple[Training, ...]
    missing_parent: str = ""


@dataclass(frozen=True, slots=True)
class RowLineage:
    """found: the row and the datasets that have it. models: those trained on one of them. descendants: those that go
    on from such a model. running: jobs that train on one of them and have not ended. unknown: others of which
    nobody can say, because a dataset or a model that they come from was deleted."""

    found: datasets_pb2.FindRowsResponse
    models: tuple[models_pb2.Adapter, ...]
    descendants: tuple[models_pb2.Adapter, ...]
    running: tuple[jobs_pb2.Job, ...]
    unknown: tuple[models_pb2.Adapter, ...]


class Lineage:
    """Lineage within the caller's project."""

    def __init__(self, datasets: Datasets, adapters: Adapters, jobs: Jobs) -> None:
        self._datasets = datasets
        self._adapters = adapters
        self._jobs = jobs

    def of_model(self, model_id: str) -> ModelLineage:
        """The jobs and rows that a tuned model (ft:…) is made of. Raises NotFound."""
        chain, missing = ancestry(model_id, self._adapters.list())
        return ModelLineage(tuple(map(self._training, chain)), missing)

    def of_row(self, *, row: str = "", dataset: str = "", line: int = 0, digest: str = "") -> RowLineage:
        """What became of a row: given as JSON, as a line of a dataset, or by its digest.

        Raises NotFound, InvalidArgument, FailedPrecondition.
        """
        found = self._datasets.find(row=row, dataset=dataset, line=line, digest=digest)
        names = {place.dataset.name for place in found.places}
        adapters = list(self._adapters.list())
        models = trained_on({place.dataset.sha256 for place in found.places}, adapters)
        later = descendants(models, adapters)
        # Only these were looked into.
        ready = (each for each in self._datasets.list("fine-tune") if each.state == _READY)
        doubtful = undocumented(adapters, {each.sha256 for each in ready})
        return RowLineage(
            found=found,
            models=models,
            descendants=later,
            running=tuple(
                job for job in self._jobs.list() if job.state not in ENDED and job.training_dataset in names
            ),
            unknown=tuple(each for each in doubtful if each not in (*models, *later)),
        )

    def _training(self, adapter: models_pb2.Adapter) -> Training:
        lineage = adapter.lineage
        try:
            job = self._jobs.get(lineage.job)
        except NotFound:
            job = None
        rows = self._datasets.trained_rows(lineage.dataset_sha256, lineage.audit_key)
        return Training(adapter, job, rows)


def ancestry(model_id: str, adapters: Iterable[models_pb2.Adapter]) -> tuple[list[models_pb2.Adapter], str]:
    """A model, the one it goes on from, and so on; and the id at which the chain breaks off, empty if it does not.
    Raises NotFound for a model that is not among the adapters."""
    by_id = {adapter.model_id: adapter for adapter in adapters}
    if model_id not in by_id:
        raise NotFound(
            f"The model {model_id!r} was not found; lineage is of tuned models (ft:…).",
            reason="MODEL_NOT_FOUND",
        )
    chain: list[models_pb2.Adapter] = []
    while model_id in by_id:
        # A model can only go on from one that was there before it: taking each out once says so.
        chain.append(by_id.pop(model_id))
        model_id = chain[-1].lineage.parent_model_id
    return chain, model_id


def trained_on(
    digests: Iterable[str], adapters: Iterable[models_pb2.Adapter]
) -> tuple[models_pb2.Adapter, ...]:
    """Those whose own job trained on a file with one of these digests."""
    wanted = set(digests)
    return tuple(each for each in adapters if each.lineage.dataset_sha256 in wanted)


def descendants(
    models: Sequence[models_pb2.Adapter], adapters: Sequence[models_pb2.Adapter]
) -> tuple[models_pb2.Adapter, ...]:
    """Those that go on from one of `models`, over any number of generations, and are none of them."""
    known = {model.model_id for model in models}
    found: list[models_pb2.Adapter] = []
    while True:
        more = [
            each for each in adapters if each.lineage.parent_model_id in known and each.model_id not in known
        ]
        if not more:
            return tuple(found)
        found += more
        known |= {each.model_id for each in more}


def undocumented(
    adapters: Sequence[models_pb2.Adapter], digests: Collection[str]
) -> tuple[models_pb2.Adapter, ...]:
    """Those that come, over any number of generations, from a file with none of these digests or from a model that is
    not among the adapters."""
    ids = {"", *(each.model_id for each in adapters)}
    roots = tuple(
        each
        for each in adapters
        if each.lineage.dataset_sha256 not in digests or each.lineage.parent_model_id not in ids
    )
    return (*roots, *descendants(roots, adapters))
