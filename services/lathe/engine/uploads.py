"""The checkpoints of one attempt on their way into the object store, and out of it when they are superseded."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from shutil import rmtree

from lathe.common.clock import Clock
from lathe.common.errors import LatheError
from lathe.common.objectstore.base import ObjectStore
from lathe.engine.apart import apart
from lathe.engine.basecache import ensure_adapter
from lathe.engine.checkpoints import Manifest, checkpoint_prefix, delete, describe, sweep, upload
from lathe.engine.model import (
    WEIGHTS_FILES,
    AdapterRef,
    Attempt,
    CheckpointReport,
    EngineReceipt,
    Environment,
    SlicePlan,
    Snapshot,
    SnapshotKind,
    WeightComparison,
)
from lathe.engine.outbox import Outbox
from lathe.engine.patience import Patience
from lathe.engine.receipt import compare
from lathe.engine.retention import Stored, kept_steps, removable, superseded_steps

logger = logging.getLogger(__name__)


class Uploads:
    """Waiting snapshots, in order. final and receipt: of the job's result, once that is stored.

    cache: verified adapters. environment: what this process computes with.
    """

    def __init__(
        self,
        attempt: Attempt,
        outbox: Outbox,
        *,
        store: ObjectStore,
        clock: Clock,
        patience: Patience,
        cache: Path,
        environment: Environment,
    ) -> None:
        self._attempt, self._outbox, self._store, self._clock = attempt, outbox, store, clock
        self._patience, self._cache, self._environment = patience, cache, environment
        self._stored: list[Stored] = []
        self._superseded: set[int] = set()
        self.waiting: deque[Snapshot] = deque()
        self.final: AdapterRef | None = None
        self.receipt: EngineReceipt | None = None

    def found(self, stored: Iterable[Stored], epochs: Iterable[CheckpointReport]) -> None:
        """What earlier attempts left. Those that are kept may never have been reported, those that are not never been
        deleted: jobs hears of both."""
        self._stored.extend(stored)
        kept = kept_steps(self._stored, self._keep)
        self._outbox.checkpoints.extend(item for item in epochs if item.step in kept)
        self._give_up()

    async def store(self, plan: SlicePlan, *, cancelled: bool) -> None:
        """Everything that waits. cancelled: nobody will go on, so that no resume checkpoint is needed any more."""
        while self.waiting:
            snapshot = self.waiting.popleft()
            # Of resume checkpoints a newer one is enough.
            if snapshot.kind is not SnapshotKind.RESUME or not (self.waiting or cancelled):
                await self._upload(snapshot, plan)
            await asyncio.to_thread(rmtree, snapshot.folder, ignore_errors=True)

    async def remove_superseded(self) -> None:
        """The files that nobody needs while the job runs. What the store does not do now is tried at the next
        checkpoint; what waits to be stored comes first."""
        for item in removable(self._stored, frozenset(self._outbox.given_up)):
            if self.waiting:
                return
            try:
                await delete(self._store, item.prefix)
            except LatheError as error:
                logger.warning("the superseded %s is left in the store: %s", item.prefix, error)
                return
            self._stored.remove(item)

    async def sweep(self) -> None:
        """Every attempt's files but for what users keep: call when no attempt will go on. What the store does not do
        now stays."""
        kept = kept_steps(self._stored, self._keep)
        known = {item.prefix for item in self._stored if item.kind is SnapshotKind.RESUME}
        for attempt in (self._attempt.output_prefix, *self._attempt.earlier_prefixes):
            try:
                await sweep(self._store, attempt, kept, known)
            except LatheError as error:
                logger.warning("checkpoints of %s are left in the store: %s", attempt, error)

    @property
    def _keep(self) -> int:
        return self._attempt.config.keep_checkpoints

    def _give_up(self) -> None:
        new = [step for step in superseded_steps(self._stored, self._keep) if step not in self._superseded]
        self._outbox.dropped.extend(new)
        self._superseded.update(new)

    async def _upload(self, snapshot: Snapshot, plan: SlicePlan) -> None:
        prefix = checkpoint_prefix(self._attempt.output_prefix, snapshot)
        unreported = tuple(self._outbox.metrics)
        manifest = await asyncio.to_thread(describe, snapshot, plan, unreported)
        if snapshot.kind is SnapshotKind.FINAL:
            self.receipt = await self._receipt_of(snapshot, manifest)
        ref = await self._patience(lambda: upload(self._store, prefix, snapshot.folder, manifest))
        if snapshot.kind is SnapshotKind.FINAL:
            self.final = ref
            return
        loss = snapshot.metrics.full_valid_loss if snapshot.metrics is not None else None
        self._stored.append(Stored(prefix, snapshot.step, snapshot.kind, loss))
        if snapshot.kind is SnapshotKind.EPOCH:
            self._outbox.checkpoints.append(CheckpointReport(snapshot.step, ref, snapshot.metrics))
            self._give_up()

    async def _receipt_of(self, snapshot: Snapshot, manifest: Manifest) -> EngineReceipt:
        """How the final adapter in the snapshot's folder was computed and, for a rerun, how it compares."""
        return EngineReceipt(
            self._environment,
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
            first = await self._patience(
                lambda: ensure_adapter(self._store, wanted, self._cache, self._clock)
            )
        except LatheError as error:
            return WeightComparison(bit_identical=False, not_compared_reason=error.message)
        return await apart(partial(compare, first, final))
