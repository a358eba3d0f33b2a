"""One leased attempt on the asynchronous side: prepare it, upload its snapshots, report, complete."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

from lathe.common.clock import Clock
from lathe.common.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    LatheError,
    NotFound,
    OutOfRange,
    Unavailable,
    Unimplemented,
)
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.basecache import ensure_adapter
from lathe.engine.batch import TrainRow
from lathe.engine.checkpoints import (
    Found,
    Manifest,
    checkpoint_prefix,
    delete,
    describe,
    digest_file,
    newest_complete,
    resumes_to_drop,
    upload,
)
from lathe.engine.loop import ModelLoop
from lathe.engine.model import (
    WEIGHTS_FILES,
    AdapterRef,
    Attempt,
    AttemptError,
    AttemptEvent,
    CheckpointReport,
    Ended,
    EngineReceipt,
    Environment,
    HeldLease,
    Note,
    Outcome,
    Progress,
    SlicePlan,
    Snapshot,
    SnapshotKind,
    StepMetrics,
    TokenRef,
    TrainingConfig,
    WeightComparison,
    is_disk_full,
    outcome_of,
)
from lathe.engine.ports import Jobs, TrainVerbs
from lathe.engine.receipt import compare
from lathe.engine.recipes.methods import recipe_of
from lathe.engine.recipes.preflight import Memory
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.samples import Speech
from lathe.engine.recipes.saving import Start

logger = logging.getLogger(__name__)

AWAY = (Unavailable, DeadlineExceeded)
# Answers of jobs that will most likely be the same the next time.
REFUSALS = (InvalidArgument, FailedPrecondition, NotFound, OutOfRange, Unimplemented, Internal)
MAX_REFUSALS = 5
REPORT_ROWS = 200
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AttemptSettings:
    """work: a local folder of this engine's own. cache: verified adapters. plan: for jobs without one yet.

    read_rows: the rows of an Arrow object in a file; may block. environment: what this process computes with. memory:
    for a job's preflight, None for none. speech: for the answers to held-out prompts, None for none.
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


class AttemptRunner:
    """Lives in the event loop. `run` returns when jobs knows the end, or when the lease is lost."""

    def __init__(
        self,
        *,
        attempt: Attempt,
        engine: TrainVerbs,
        loop: ModelLoop,
        jobs: Jobs,
        store: ObjectStore,
        clock: Clock,
        settings: AttemptSettings,
    ) -> None:
        self._attempt, self._engine, self._loop = attempt, engine, loop
        self._jobs, self._store, self._clock, self._settings = jobs, store, clock, settings
        self._lease = HeldLease(attempt.attempt_id, attempt.lease_token)
        self._folder = settings.work / attempt.attempt_id
        self._plan = attempt.slice_plan or settings.plan
        self._first: Progress | None = None
        self._metrics: deque[StepMetrics] = deque()
        self._notes: deque[Note] = deque()
        self._checkpoints: deque[CheckpointReport] = deque()
        self._snapshots: deque[Snapshot] = deque()
        self._resumes: list[str] = []
        self._final: AdapterRef | None = None
        self._receipt: EngineReceipt | None = None
        self._ended: Ended | None = None
        self._uploaded = False
        self._refusals = 0
        self._gave_up = False
        self._preparing: asyncio.Task[Run] | None = None
        self._wanted: Outcome | None = None
        self._abandoned = False
        self._may_report = asyncio.Event()
        self._may_report.set()
        self._changed = asyncio.Event()

    # What the worker tells it.

    def stop(self, outcome: Outcome) -> None:
        """End as CANCELLED, or as RELEASED after a checkpoint."""
        if self._wanted is not None:
            return
        self._wanted = outcome
        if self._preparing is not None and not self._preparing.done():
            self._preparing.cancel()
        else:
            self._end_in_loop(outcome)

    def _end_in_loop(self, outcome: Outcome) -> None:
        if outcome is Outcome.CANCELLED:
            self._loop.cancel_attempt(self._attempt.attempt_id)
        else:
            self._loop.release_attempt(self._attempt.attempt_id)

    def suspend(self, suspended: bool) -> None:
        """The lease ran out by our own clock (train and report nothing), or it was renewed after all."""
        self._loop.suspend_attempt(self._attempt.attempt_id, suspended)
        if suspended:
            self._may_report.clear()
        else:
            self._may_report.set()

    def abandon(self) -> None:
        """Nobody hears our reports any more: return once the checkpoint is stored."""
        self._abandoned = True
        self._may_report.set()
        self._changed.set()

    # The run.

    async def run(self) -> None:
        """Raises Aborted when the lease is another engine's; nothing of the attempt is left running then."""
        uploads: asyncio.Task[None] | None = None
        try:
            recipe = await self._prepared()
            if recipe is not None:
                deliver = self._deliver(asyncio.get_running_loop())
                self._loop.start(self._attempt.attempt_id, recipe, deliver)
                # What was said before the loop knew the attempt went past it.
                if not self._may_report.is_set():
                    self._loop.suspend_attempt(self._attempt.attempt_id, True)
                if self._wanted is not None:
                    self._end_in_loop(self._wanted)
                uploads = asyncio.create_task(self._upload_all())
            await self._report_all()
        finally:
            self._loop.drop_attempt(self._attempt.attempt_id)
            if uploads is not None:
                uploads.cancel()
                await asyncio.gather(uploads, return_exceptions=True)
            await asyncio.to_thread(rmtree, self._folder, ignore_errors=True)

    def _deliver(self, io: asyncio.AbstractEventLoop) -> Callable[[AttemptEvent], None]:
        return lambda event: _call_in(io, self._take, event)

    def _take(self, event: AttemptEvent) -> None:
        if self._gave_up:
            return
        if isinstance(event, StepMetrics):
            self._metrics.append(event)
        elif isinstance(event, Note):
            self._notes.append(event)
        elif isinstance(event, Snapshot):
            self._snapshots.append(event)
        else:
            self._ended = event
        self._changed.set()

    async def _prepared(self) -> Run | None:
        """None when it ended before it began; `_ended` says how."""
        self._preparing = asyncio.create_task(self._prepare())
        if self._wanted is not None:
            self._preparing.cancel()
        try:
            recipe = await self._preparing
        except asyncio.CancelledError:
            if self._wanted is None:
                self._preparing.cancel()
                raise
            self._ended = Ended(self._wanted, 0)
        except Exception as error:
            logger.exception("attempt %s could not be prepared", self._attempt.attempt_id)
            outcome, reason = outcome_of(error)
            self._ended = Ended(outcome, 0, 0, reason)
        else:
            return recipe
        self._uploaded = True
        return None

    async def _prepare(self) -> Run:
        attempt = self._attempt
        await self._patiently(lambda: asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True))
        training = await self._patiently(lambda: self._rows(attempt.training))
        validation: Sequence[TrainRow] = ()
        if attempt.validation is not None:
            wanted = attempt.validation
            validation = await self._patiently(lambda: self._rows(wanted))
        prefixes = (attempt.output_prefix, *attempt.earlier_prefixes)
        damaged: dict[str, Note] = {}
        found = await self._patiently(
            lambda: newest_complete(
                self._store,
                prefixes,
                self._folder,
                lambda prefix, error: damaged.update({prefix: _damage(prefix, error)}),
            )
        )
        self._notes.extend(damaged.values())
        self._choose_plan(found)
        method, initial = recipe_of(attempt.config.method), None
        if attempt.initial_adapter is not None and (found is None or method.needs_initial):
            ref = attempt.initial_adapter
            initial = await self._patiently(lambda: self._parent(ref))
        memory = self._settings.memory
        recipe = Run(
            method,
            engine=self._engine,
            key=f"train/{attempt.attempt_id}",
            data=TrainData(training, validation),
            config=attempt.config,
            plan=self._plan,
            folder=self._snapshot_folder,
            clock=self._clock,
            start=_start(found),
            initial_adapter=initial,
            halvings=attempt.halvings,
            memory=memory(attempt.config) if memory is not None else None,
            checkpoint_interval_s=self._settings.checkpoint_interval_s,
            speech=self._settings.speech,
        )
        self._first = Progress(slice_plan=self._plan, total_steps=recipe.total_steps)
        if found is not None:
            logger.info("attempt %s goes on from step %d", attempt.attempt_id, found.manifest.step)
            self._checkpoints.extend(found.epochs)
            self._metrics.extend(found.manifest.unreported)
        return recipe

    async def _parent(self, ref: AdapterRef) -> Path:
        """The adapter to start from. Raises FailedPrecondition if it is gone, which no other attempt can change."""
        try:
            return await ensure_adapter(self._store, ref, self._settings.cache, self._clock)
        except NotFound as error:
            raise FailedPrecondition(
                f"The model that the job goes on from was deleted: {error.message}", reason="PARENT_DELETED"
            ) from error

    def _choose_plan(self, found: Found | None) -> None:
        # An attempt may have been lost before its first report: its plan is in the manifest then.
        if self._attempt.slice_plan is None and found is not None:
            self._plan = found.manifest.slice_plan
        ours = self._settings.plan
        if (ours.threads, ours.dtype, ours.device) != (
            self._plan.threads,
            self._plan.dtype,
            self._plan.device,
        ):
            logger.warning(
                "attempt %s began as %s and goes on as %s: its numbers will be close, not the same bits",
                self._attempt.attempt_id,
                self._plan,
                ours,
            )

    async def _rows(self, ref: TokenRef) -> Sequence[TrainRow]:
        path = self._folder / f"{ref.sha256}.arrow"
        try:
            await self._store.fetch(ref.object_key, path)
        except NotFound as error:
            raise DataLoss(f"The tokens at {ref.object_key} are gone from the object store.") from error
        if await asyncio.to_thread(digest_file, path) != ref.sha256:
            raise DataLoss(f"{ref.object_key} does not have the SHA-256 that jobs stated.")
        return await asyncio.to_thread(self._settings.read_rows, path)

    def _snapshot_folder(self, kind: SnapshotKind, step: int) -> Path:
        folder = self._folder / f"{kind}-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeat while the store is away or the disk is full."""
        wait = 0.5
        while True:
            try:
                return await work()
            except (*AWAY, OSError) as error:
                if isinstance(error, OSError) and not is_disk_full(error):
                    raise
                logger.warning("attempt %s waits: %s", self._attempt.attempt_id, error)
                await self._clock.sleep(wait)
                wait = min(wait * 2, self._settings.retry_max_s)

    # Uploads, in order.

    async def _upload_all(self) -> None:
        try:
            while True:
                self._changed.clear()
                while self._snapshots:
                    await self._upload(self._snapshots.popleft())
                if self._ended is not None:
                    break
                await self._changed.wait()
        except Exception as error:
            logger.exception("attempt %s cannot store its checkpoint", self._attempt.attempt_id)
            self._loop.drop_attempt(self._attempt.attempt_id)
            step = self._metrics[-1].step if self._metrics else 0
            self._ended = Ended(Outcome.RETRYABLE, step, 0, outcome_of(error)[1])
        self._uploaded = True

    async def _upload(self, snapshot: Snapshot) -> None:
        cancelled = self._ended is not None and self._ended.outcome is Outcome.CANCELLED
        if snapshot.kind is SnapshotKind.RESUME and (self._snapshots or cancelled):
            # A newer one is there already, or nobody will go on.
            await asyncio.to_thread(rmtree, snapshot.folder, ignore_errors=True)
            return
        prefix = checkpoint_prefix(self._attempt.output_prefix, snapshot)
        waiting = tuple(self._metrics)
        manifest = await asyncio.to_thread(describe, snapshot, self._plan, waiting)
        if snapshot.kind is SnapshotKind.FINAL:
            self._receipt = await self._receipt_of(snapshot, manifest)
        ref = await self._patiently(lambda: upload(self._store, prefix, snapshot.folder, manifest))
        await asyncio.to_thread(rmtree, snapshot.folder, ignore_errors=True)
        if snapshot.kind is SnapshotKind.EPOCH:
            self._checkpoints.append(CheckpointReport(snapshot.step, ref, snapshot.metrics))
        elif snapshot.kind is SnapshotKind.FINAL:
            self._final = ref
        else:
            self._resumes.append(prefix)
            for old in resumes_to_drop(self._resumes):
                await self._patiently(lambda old=old: delete(self._store, old))  # type: ignore[misc]
                self._resumes.remove(old)

    async def _receipt_of(self, snapshot: Snapshot, manifest: Manifest) -> EngineReceipt:
        """How the final adapter in the snapshot's folder was computed and, for a rerun, how it compares."""
        return EngineReceipt(
            self._settings.environment,
            halvings=tuple(sorted(snapshot.halvings.items())),
            fused=snapshot.state.fused,
            weights_sha256=next(
                (entry.sha256 for entry in manifest.files if entry.path in WEIGHTS_FILES), ""
            ),
            comparison=await self._comparison(snapshot.folder),
        )

    async def _comparison(self, final: Path) -> WeightComparison | None:
        wanted = self._attempt.compare_with
        if wanted is None:
            return None
        try:
            first = await self._patiently(
                lambda: ensure_adapter(self._store, wanted, self._settings.cache, self._clock)
            )
        except LatheError as error:
            return WeightComparison(bit_identical=False, not_compared_reason=error.message)
        return await asyncio.to_thread(compare, first, final)

    # Reports, in order.

    async def _report_all(self) -> None:
        wait = self._settings.report_interval_s
        while True:
            await self._may_report.wait()
            try:
                if self._ended is not None and self._uploaded and self._abandoned:
                    return
                await self._report()
                if self._ended is not None and self._uploaded and not self._pending():
                    await self._complete(self._ended)
                    return
                wait = self._settings.report_interval_s
                self._refusals = 0
            except Aborted:
                raise
            except LatheError as error:
                if isinstance(error, REFUSALS):
                    self._refused(error)
                logger.warning("attempt %s: report not taken: %s", self._attempt.attempt_id, error)
                wait = min(max(wait, 0.5) * 2, self._settings.retry_max_s)
            await self._clock.sleep(wait)

    def _refused(self, error: LatheError) -> None:
        """After several in a row nothing will change: end the attempt, or jobs would renew its lease for ever.

        Raises the error when even that is not taken; the lease runs out then.
        """
        self._refusals += 1
        if self._refusals < MAX_REFUSALS:
            return
        if self._gave_up:
            raise error
        step = self._metrics[-1].step if self._metrics else 0
        said = f"jobs refuses the reports of this attempt: {error.message}"
        self._loop.drop_attempt(self._attempt.attempt_id)
        self._gave_up, self._refusals, self._first = True, 0, None
        self._metrics.clear()
        self._notes.clear()
        self._checkpoints.clear()
        self._snapshots.clear()
        self._ended = Ended(Outcome.RETRYABLE, step, 0, AttemptError("server_error", said))
        self._changed.set()

    def _pending(self) -> bool:
        return bool(self._metrics or self._notes or self._checkpoints or self._first is not None)

    async def _report(self) -> None:
        while self._pending():
            rows, checkpoints = tuple(self._metrics)[: self._settings.report_rows], tuple(self._checkpoints)
            if len(rows) < len(self._metrics):
                # A checkpoint brings its step's metrics: it must not come before the steps that lead to it.
                checkpoints = tuple(item for item in checkpoints if item.step <= rows[-1].step)
            first, notes = self._first or Progress(), tuple(self._notes)
            await self._jobs.report(
                self._lease, Progress(rows, checkpoints, first.slice_plan, first.total_steps, notes)
            )
            self._first = None
            for _ in notes:
                self._notes.popleft()
            for _ in rows:
                self._metrics.popleft()
            for _ in checkpoints:
                self._checkpoints.popleft()

    async def _complete(self, ended: Ended) -> None:
        if ended.outcome is Outcome.SUCCEEDED and self._final is None:
            ended = Ended(Outcome.RETRYABLE, ended.step)
        await self._jobs.complete(
            self._lease,
            ended.outcome,
            step=ended.step,
            trained_tokens=ended.trained_tokens,
            final_adapter=self._final if ended.outcome is Outcome.SUCCEEDED else None,
            error=ended.error,
            receipt=self._receipt if ended.outcome is Outcome.SUCCEEDED else None,
        )


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


def _call_in(
    io: asyncio.AbstractEventLoop, take: Callable[[AttemptEvent], None], event: AttemptEvent
) -> None:
    # The event loop is closed only when the process is about to exit; then nobody is left to hear it.
    if not io.is_closed():
        io.call_soon_threadsafe(take, event)
