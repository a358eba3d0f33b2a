"""From a lease to a run that can begin: its rows, what earlier attempts left, the adapter to start from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lathe.common.clock import Clock
from lathe.common.errors import DataLoss, FailedPrecondition, NotFound
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.basecache import ensure_adapter
from lathe.engine.batch import TrainRow
from lathe.engine.checkpoints import Found, digest_file, newest_complete
from lathe.engine.model import (
    AdapterRef,
    Attempt,
    Environment,
    Note,
    SlicePlan,
    SnapshotKind,
    TokenRef,
    TrainingConfig,
)
from lathe.engine.patience import Patience
from lathe.engine.ports import TrainVerbs
from lathe.engine.recipes.methods import recipe_of
from lathe.engine.recipes.preflight import Memory
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.samples import Speech
from lathe.engine.recipes.saving import Start

logger = logging.getLogger(__name__)

REPORT_ROWS = 200


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """work: a local folder of this engine's own. cache: verified adapters. plan: for jobs without one yet.

    read_rows: the rows of an Arrow object in a file; may block. environment: what this process computes with. memory:
    for a job's preflight, None for none. speech: for the answers to held-out prompts, None for none. notes: what every
    job is told before its first step here.
    """

    work: Path
    cache: Path
    plan: SlicePlan
    read_rows: Callable[[Path], Sequence[TrainRow]]
    environment: Environment = field(default_factory=Environment)
    memory: Callable[[TrainingConfig], Memory] | None = None
    report_interval_s: float = 0.5
    checkpoint_interval_s: float = 60.0
    retry_max_s: float = 15.0
    report_rows: int = REPORT_ROWS
    speech: Speech | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """plan: how the run's slices are cut. found: where it goes on from. damaged: what it cannot go on from."""

    run: Run
    plan: SlicePlan
    found: Found | None
    damaged: tuple[Note, ...]


class Preparation:
    """folder: of the attempt's own, made here."""

    def __init__(
        self,
        attempt: Attempt,
        engine: TrainVerbs,
        settings: AttemptSettings,
        *,
        store: ObjectStore,
        clock: Clock,
        folder: Path,
        patience: Patience,
    ) -> None:
        self._attempt, self._engine, self._settings = attempt, engine, settings
        self._store, self._clock, self._folder, self._patience = store, clock, folder, patience

    async def run(self) -> Prepared:
        """Raises DataLoss for rows that are not what was written, FailedPrecondition for rows that are gone and for a
        deleted parent."""
        attempt, settings = self._attempt, self._settings
        await self._patience(lambda: asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True))
        training = await self._patience(lambda: self._rows(attempt.training))
        validation: Sequence[TrainRow] = ()
        if attempt.validation is not None:
            wanted = attempt.validation
            validation = await self._patience(lambda: self._rows(wanted))
        found, damaged = await self._newest()
        plan = self._plan(found)
        method, initial = recipe_of(attempt.config.method), None
        if attempt.initial_adapter is not None and (found is None or method.needs_initial):
            ref = attempt.initial_adapter
            initial = await self._patience(lambda: self._parent(ref))
        run = Run(
            method,
            engine=self._engine,
            key=f"train/{attempt.attempt_id}",
            data=TrainData(training, validation),
            config=attempt.config,
            plan=plan,
            folder=self._snapshot_folder,
            clock=self._clock,
            start=_start(found),
            initial_adapter=initial,
            halvings=attempt.halvings,
            memory=settings.memory(attempt.config) if settings.memory is not None else None,
            checkpoint_interval_s=settings.checkpoint_interval_s,
            speech=settings.speech,
        )
        if found is not None:
            logger.info("attempt %s goes on from step %d", attempt.attempt_id, found.manifest.step)
        return Prepared(run, plan, found, damaged)

    async def _newest(self) -> tuple[Found | None, tuple[Note, ...]]:
        """The checkpoint to go on from, and a note for each that is damaged."""
        prefixes = (self._attempt.output_prefix, *self._attempt.earlier_prefixes)
        damaged: dict[str, Note] = {}

        def hear(prefix: str, error: DataLoss) -> None:
            damaged[prefix] = _damage(prefix, error)

        found = await self._patience(lambda: newest_complete(self._store, prefixes, self._folder, hear))
        return found, tuple(damaged.values())

    async def _parent(self, ref: AdapterRef) -> Path:
        """The adapter to start from. Raises FailedPrecondition if it is gone, which no other attempt can change."""
        try:
            return await ensure_adapter(self._store, ref, self._settings.cache, self._clock)
        except NotFound as error:
            raise FailedPrecondition(
                f"The model that the job goes on from was deleted: {error.message}", reason="PARENT_DELETED"
            ) from error

    def _plan(self, found: Found | None) -> SlicePlan:
        ours = self._settings.plan
        plan = self._attempt.slice_plan or ours
        # An attempt may have been lost before its first report: its plan is in the manifest then.
        if self._attempt.slice_plan is None and found is not None:
            plan = found.manifest.slice_plan
        if (ours.threads, ours.dtype, ours.device) != (plan.threads, plan.dtype, plan.device):
            logger.warning(
                "attempt %s began as %s and goes on as %s: its numbers will be close, not the same bits",
                self._attempt.attempt_id,
                plan,
                ours,
            )
        return plan

    async def _rows(self, ref: TokenRef) -> Sequence[TrainRow]:
        path = self._folder / f"{ref.sha256}.arrow"
        try:
            await self._store.fetch(ref.object_key, path)
        except NotFound as error:
            # Another attempt would find them no more than this one.
            raise FailedPrecondition(
                f"The tokens of a file of this job ({ref.object_key}) are gone from the object store. Create the job "
                "again, with the file uploaded again if it was deleted.",
                reason="TOKENS_GONE",
            ) from error
        if await asyncio.to_thread(digest_file, path) != ref.sha256:
            raise DataLoss(f"{ref.object_key} does not have the SHA-256 that jobs stated.")
        return await asyncio.to_thread(self._settings.read_rows, path)

    def _snapshot_folder(self, kind: SnapshotKind, step: int) -> Path:
        folder = self._folder / f"{kind}-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _damage(prefix: str, error: DataLoss) -> Note:
    """What the user hears of a checkpoint that cannot be gone on from."""
    name = prefix.rpartition("/")[2]
    return Note(
        int(name.removeprefix("step-")),
        "checkpoint_damaged",
        f"The checkpoint {name} cannot be used: {error.message} The job goes on from the one before it.",
    )


def _start(found: Found | None) -> Start | None:
    if found is None:
        return None
    manifest = found.manifest
    halvings = tuple(sorted((manifest.halvings or {}).items()))
    return Start(found.folder, manifest.step, manifest.trained_tokens, halvings, manifest.state)
