"""Which job goes where, which engines start and stop, and why a job waits: decided from a picture, purely."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from lathe.jobs.model import BaseRef, EngineRecord, EngineState, Job, Pool

MAX_LOST_LEASES = 100
MAX_RETRIES = 3
MAX_START_FAILURES = 5
MAX_BACKOFF_S = 60.0
# The quota of a project that nobody could look up yet: nothing of it starts.
UNKNOWN_QUOTA = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator has set; seconds."""

    engine_idle_timeout_s: float = 600.0
    engine_start_timeout_s: float = 300.0
    engine_stop_timeout_s: float = 60.0
    engine_silence_s: float = 30.0
    engine_hang_timeout_s: float = 180.0
    demand_s: float = 60.0
    min_engines: int = 0
    max_engines_per_base: int = 1
    max_engines: int = 4
    # False: somebody else starts engines.
    can_launch: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the policy looks at.

    running: jobs in a leased state. quotas: project -> how many may run; 0 or absent means no limit.
    attempts: engine id -> attempts it holds.
    """

    now: datetime
    queued: Sequence[Job] = ()
    running: Sequence[Job] = ()
    engines: Sequence[EngineRecord] = ()
    pools: Sequence[Pool] = ()
    attempts: Mapping[str, int] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    limits: Limits = Limits()
    # False just after an outage of ours, when an engine's silence proves nothing.
    trusted: bool = True


@dataclass(frozen=True, slots=True)
class Launch:
    base: BaseRef


@dataclass(frozen=True, slots=True)
class StopEngine:
    """force: end the process; otherwise tell it in its next heartbeat's answer."""

    engine_id: str
    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Explain:
    """The job's state_reason becomes this sentence."""

    job_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The job cannot run; `reason` says why."""

    job_id: str
    reason: str


Decision = Launch | StopEngine | Explain | Refuse


def next_job(
    base_digest: str, queued: Sequence[Job], running: Sequence[Job], quotas: Mapping[str, int], now: datetime
) -> Job | None:
    """The job that an engine of this base should take.

    Among the projects with room in their quota the one with the fewest running jobs; the oldest of its jobs.
    """
    counts = _counts(running)
    ready = [
        job
        for job in queued
        if job.base.digest == base_digest
        and (job.hold_until is None or job.hold_until <= now)
        and _has_room(job.project, counts, quotas)
    ]
    return min(ready, key=lambda job: (counts.get(job.project, 0), *_age(job)), default=None)


def line(queued: Sequence[Job], running: Sequence[Job]) -> list[Job]:
    """The waiting jobs in the order in which fair share will likely take them."""
    counts = dict(_counts(running))
    rest = sorted(queued, key=_age)
    order = []
    while rest:
        job = min(rest, key=lambda candidate: (counts.get(candidate.project, 0), *_age(candidate)))
        rest.remove(job)
        counts[job.project] = counts.get(job.project, 0) + 1
        order.append(job)
    return order


def decide(picture: Snapshot) -> list[Decision]:
    """Launches, stops and reasons, in that order."""
    return [*_launches(picture), *_stops(picture), *_words(picture)]


def is_serving(engine: EngineRecord, now: datetime, limits: Limits) -> bool:
    """Registered, heard of lately and staying."""
    return (
        engine.state is EngineState.READY
        and not engine.draining
        and engine.heartbeat_time is not None
        and (now - engine.heartbeat_time).total_seconds() <= limits.engine_silence_s
    )


def backoff_s(failures: int) -> float:
    """Wait before the next try after so many failures in a row: 1, 2, 4 … 60 seconds."""
    return float(min(MAX_BACKOFF_S, 2 ** max(0, min(failures, 10) - 1)))


def _age(job: Job) -> tuple[datetime, str]:
    return (job.queue_time or job.create_time, job.id)


def _counts(running: Sequence[Job]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for job in running:
        counts[job.project] = counts.get(job.project, 0) + 1
    return counts


def _has_room(project: str, counts: Mapping[str, int], quotas: Mapping[str, int]) -> bool:
    limit = quotas.get(project, 0)
    return limit == 0 or counts.get(project, 0) < limit


def _wanted(picture: Snapshot) -> dict[str, BaseRef]:
    """Bases that somebody waits for, oldest wish first."""
    counts = _counts(picture.running)
    wanted = {
        job.base.digest: job.base
        for job in line(picture.queued, picture.running)
        if _has_room(job.project, counts, picture.quotas)
    }
    for pool in picture.pools:
        if pool.demand_time is not None:
            age = (picture.now - pool.demand_time).total_seconds()
            if age <= picture.limits.demand_s or picture.limits.min_engines:
                wanted.setdefault(pool.base.digest, pool.base)
    return wanted


def _launches(picture: Snapshot) -> list[Decision]:
    limits = picture.limits
    if not limits.can_launch:
        return []
    pools = {pool.base.digest: pool for pool in picture.pools}
    total = sum(engine.launched for engine in picture.engines)
    decisions: list[Decision] = []
    for digest, base in _wanted(picture).items():
        mine = [engine for engine in picture.engines if engine.base.digest == digest]
        pool = pools.get(digest)
        held = pool is not None and pool.next_launch_time is not None and pool.next_launch_time > picture.now
        if held or total >= limits.max_engines or not _needs_another(picture, digest, mine):
            continue
        decisions.append(Launch(base))
        total += 1
    return decisions


def _needs_another(picture: Snapshot, digest: str, engines: Sequence[EngineRecord]) -> bool:
    coming = [engine for engine in engines if engine.state is EngineState.LAUNCHING]
    # A draining engine still has its memory and its cores: the next one waits for its end.
    if coming or len(engines) >= picture.limits.max_engines_per_base:
        return False
    serving = [engine for engine in engines if is_serving(engine, picture.now, picture.limits)]
    if not serving:
        return True
    free = sum(max(0, engine.max_attempts - picture.attempts.get(engine.id, 0)) for engine in serving)
    waiting = sum(job.base.digest == digest for job in picture.queued)
    return waiting > free


def _stops(picture: Snapshot) -> list[Decision]:
    decisions: list[Decision] = []
    limits = picture.limits
    wanted = _wanted(picture)
    staying: dict[str, int] = {}
    for engine in picture.engines:
        if engine.state is EngineState.READY:
            staying[engine.base.digest] = staying.get(engine.base.digest, 0) + 1
    for engine in sorted(picture.engines, key=lambda e: e.busy_time or e.create_time):
        stop = _stop(engine, picture)
        if stop is not None and stop.force and not picture.trusted:
            continue
        if stop is not None and not stop.force:
            needed = engine.base.digest in wanted or staying.get(engine.base.digest, 0) <= limits.min_engines
            if needed:
                continue
            staying[engine.base.digest] -= 1
        if stop is not None:
            decisions.append(stop)
    return decisions


def _stop(engine: EngineRecord, picture: Snapshot) -> StopEngine | None:
    limits = picture.limits

    def older(since: datetime, seconds: float) -> bool:
        return picture.now - since > timedelta(seconds=seconds)

    match engine.state:
        case EngineState.LAUNCHING if older(engine.create_time, limits.engine_start_timeout_s):
            return StopEngine(engine.id, "it did not register in time", force=True)
        case EngineState.STOPPING if older(
            engine.stop_time or engine.create_time, limits.engine_stop_timeout_s
        ):
            return StopEngine(engine.id, "it did not end in time", force=True)
        case EngineState.READY:
            if older(engine.heartbeat_time or engine.create_time, limits.engine_hang_timeout_s):
                return StopEngine(engine.id, "it was silent for too long", force=True)
            busy = picture.attempts.get(engine.id, 0) or engine.active_sequences or not engine.launched
            last = max(engine.busy_time or engine.create_time, _demand(engine, picture))
            if not busy and older(last, limits.engine_idle_timeout_s):
                return StopEngine(engine.id, "it had nothing to do")
    return None


def _demand(engine: EngineRecord, picture: Snapshot) -> datetime:
    times = [
        pool.demand_time
        for pool in picture.pools
        if pool.base.digest == engine.base.digest and pool.demand_time is not None
    ]
    return max(times, default=engine.create_time)


def _words(picture: Snapshot) -> list[Decision]:
    decisions: list[Decision] = []
    pools = {pool.base.digest: pool for pool in picture.pools}
    counts = _counts(picture.running)
    ahead: dict[str, int] = {}
    for job in line(picture.queued, picture.running):
        digest = job.base.digest
        before = ahead.get(digest, 0)
        pool = pools.get(digest)
        serving = [e for e in _of(picture.engines, digest) if is_serving(e, picture.now, picture.limits)]
        if not serving and pool is not None and _gave_up(job, pool):
            decisions.append(
                Refuse(
                    job.id,
                    f"The engine for {job.base.id} ended {pool.start_failures} times in a row while it "
                    f"started; it last said: {pool.last_error or 'nothing'}",
                )
            )
            continue
        reason = _why(job, picture, serving, pool=pool, counts=counts, ahead=before)
        if _has_room(job.project, counts, picture.quotas):
            ahead[digest] = before + 1
        if reason != job.state_reason:
            decisions.append(Explain(job.id, reason))
    return decisions


def _gave_up(job: Job, pool: Pool) -> bool:
    """Whether starts failed too often, one of them at least while this job waited."""
    if pool.start_failures < MAX_START_FAILURES:
        return False
    if pool.next_launch_time is None or job.queue_time is None:
        return True
    last_failure = pool.next_launch_time - timedelta(seconds=backoff_s(pool.start_failures))
    return job.queue_time <= last_failure


def _of(engines: Collection[EngineRecord], digest: str) -> list[EngineRecord]:
    return [engine for engine in engines if engine.base.digest == digest]


def _why(
    job: Job,
    picture: Snapshot,
    serving: Sequence[EngineRecord],
    *,
    pool: Pool | None,
    counts: Mapping[str, int],
    ahead: int,
) -> str:
    """One sentence: why the job waits, and when it will likely start."""
    limit = picture.quotas.get(job.project, 0)
    if limit == UNKNOWN_QUOTA:
        return "Waits until the project's quota can be read."
    if not _has_room(job.project, counts, picture.quotas):
        noun = "job" if limit == 1 else "jobs"
        return f"The project's quota of {limit} running {noun} is used up.{_when(job, picture, 0)}"
    if job.hold_until is not None and job.hold_until > picture.now:
        return "Waits a moment before it is tried again, because the last attempt met an error."
    if not serving:
        return _why_no_engine(job.base, picture, pool)
    if ahead == 0 and any(picture.attempts.get(engine.id, 0) < engine.max_attempts for engine in serving):
        return "An engine with room will take it within seconds."
    place = "it is next in line" if ahead == 0 else f"{ahead} before it in line"
    return f"Waits for an engine for {job.base.id} with room; {place}.{_when(job, picture, ahead)}"


def _why_no_engine(base: BaseRef, picture: Snapshot, pool: Pool | None) -> str:
    if _of(picture.engines, base.digest):
        return f"An engine for {base.id} is starting or restarting; the job starts when it is ready."
    if not picture.limits.can_launch:
        return f"Waits for an engine for {base.id} to register; this platform does not start engines itself."
    if pool is not None and pool.last_error:
        return f"The engine for {base.id} could not start and is tried again; it last said: {pool.last_error}"
    if sum(engine.launched for engine in picture.engines) >= picture.limits.max_engines:
        return f"Waits for an engine of another base model to end; {picture.limits.max_engines} may run."
    return f"An engine for {base.id} is being started."


def _when(job: Job, picture: Snapshot, ahead: int) -> str:
    """When it will likely start, in words; empty when nothing is known.

    A place comes free when the first running job ends; each job before it takes as long as that one did.
    """
    known = [
        (other.estimated_finish_time, other)
        for other in picture.running
        if other.base.digest == job.base.digest and other.estimated_finish_time is not None
    ]
    if not known:
        return ""
    first, other = min(known, key=lambda pair: (pair[0], pair[1].id))
    whole = (first - (other.start_time or first)).total_seconds()
    seconds = max(0.0, (first - picture.now).total_seconds()) + ahead * max(0.0, whole)
    minutes = round(seconds / 60)
    if minutes == 0:
        return " It will likely start within a minute."
    # Coarse on purpose: a sentence that changes each second would be a write each second.
    coarse = minutes if minutes < 10 else 5 * round(minutes / 5)
    return f" It will likely start in about {coarse} minute{'' if coarse == 1 else 's'}."
