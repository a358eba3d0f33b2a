"""The gauges of jobs. Every replica tells the same of the same database: a query takes their maximum."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from lathe.common.metrics import Metrics
from lathe.jobs.model import EngineRecord, EngineState, Job
from lathe.jobs.ports import JobSession, JobStore


async def measure(
    store: JobStore, metrics: Metrics, queued: Sequence[Job], engines: Sequence[EngineRecord], now: datetime
) -> None:
    """Set the gauges that stand for what is in the database."""
    async with store.read() as session:
        counts = await session.count_by_state()
        waits = [(now - await _waits_since(session, job)).total_seconds() for job in queued]
    metrics.job_oldest_wait_seconds.set(max([0.0, *waits]))
    for state, count in counts.items():
        metrics.jobs.labels(state=str(state)).set(count)
    for engine_state in EngineState:
        of_state = sum(engine.state is engine_state for engine in engines)
        metrics.engines.labels(state=str(engine_state)).set(of_state)


async def _waits_since(session: JobSession, job: Job) -> datetime:
    """A job keeps its place in the line for good; one that an engine has had waits since it lost that one."""
    since = job.queue_time or job.create_time
    if not job.attempt_count:
        return since
    [last, *_] = await session.attempts(job.id)
    return last.end_time or since
