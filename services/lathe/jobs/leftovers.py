"""What jobs that have ended left in the object store: found here, removed by models, which owns what lies there.

An engine removes most of it itself when its attempt ends. What is left is that of jobs whose budget of attempts is
spent, or whose engine died before it came to that.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from lathe.common.clock import Clock
from lathe.common.errors import LatheError
from lathe.jobs.auditing import FINAL
from lathe.jobs.model import Attempt, Checkpoint, Job, JobState
from lathe.jobs.ports import JobStore, Models

log = logging.getLogger(__name__)

# An engine that lost its lease may still be writing. One that is out of touch for longer has ended by itself.
SWEPT_AFTER = timedelta(hours=1)
# Looked at in one pass.
_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Every step can be repeated, by any replica: a job is marked when all of its files are gone."""

    store: JobStore
    models: Models
    clock: Clock

    async def sweep(self) -> None:
        """Sweep the files of every job that ended a while ago; one that cannot be swept holds up no other. Raises
        Unavailable if the database, models or the object store is away."""
        async with self.store.read() as session:
            ended = await session.unswept(_AT_ONCE)
        before = self.clock.now() - SWEPT_AFTER
        failed: LatheError | None = None
        for job in ended:
            if (job.finish_time or job.create_time) <= before:
                try:
                    await self._sweep(job)
                except LatheError as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    async def _sweep(self, job: Job) -> None:
        async with self.store.read() as session:
            checkpoints = await session.checkpoints(job.id)
            final = await session.attempt(job.final_attempt_id) if job.final_attempt_id else None
        try:
            await self.models.sweep_files(job, kept_prefixes(job, checkpoints, final))
        except FINAL as error:
            log.warning("The files that %s left stay in the store: %s", job.name, error)
        async with self.store.write() as session:
            await session.set_swept(job.id)


def kept_prefixes(job: Job, checkpoints: Sequence[Checkpoint], final: Attempt | None) -> list[str]:
    """The folders that stay: of the checkpoints that users are shown, and of what was trained to the end, also where
    its registration was refused: whoever mends the reason wants it."""
    kept = [point.object.prefix for point in checkpoints]
    if job.state is not JobState.CANCELLED and final is not None and final.final_adapter is not None:
        kept.append(final.final_adapter.prefix)
    return kept
