"""The token objects that unfinished jobs train on: datasets keeps them, though their files be deleted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lathe.jobs.model import TERMINAL_STATES, Job, JobState
from lathe.jobs.ports import Datasets, JobStore

_UNFINISHED = [state for state in JobState if state not in TERMINAL_STATES]


@dataclass(frozen=True, slots=True)
class TokenKeeper:
    """Says to datasets what is needed. It removes nothing while nobody says so."""

    store: JobStore
    datasets: Datasets

    async def step(self) -> None:
        """Say it once, if all of it is known here. Raises Unavailable while datasets or the database is away."""
        async with self.store.read() as session:
            newer = await session.newer_jobs()
            jobs = await session.jobs_in(_UNFINISHED)
        if newer:
            # What these need only a newer replica knows; it says so for all.
            return
        await self.datasets.keep_tokens(sorted(needed(jobs)))


def needed(jobs: Iterable[Job]) -> set[str]:
    """The digests of the token objects that the next attempts of these jobs will read."""
    return {
        tokens.sha256
        for job in jobs
        for tokens in (job.training_tokens, job.validation_tokens)
        if tokens is not None
    }
