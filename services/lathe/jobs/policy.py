"""Which job goes where, which engines start and stop, and why a job waits: decided from a picture, purely."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from lathe.jobs.model import Attempt, BaseRef, EngineRecord, EngineState, Job, NewerJob, Place, Pool

MAX_LOST_LEASES = 100
MAX_RETRIES = 3
MAX_START_FAILURES = 5
MAX_BACKOFF_S = 60.0
WAITING_NOTED_EVERY_S = 30.0
# Kubernetes takes 50 s to notice that a node is lost; until then it would put the next engine there.
SUSPECT_S = 120.0
# The quota of a project that nobody could look up yet: nothing of it starts.
UNKNOWN_QUOTA = -1

# What holds a place.
Running = Job | NewerJob


@dataclass(frozen=True, slots=True)
class Limits:
    """What an operator has set; seconds."""

    engine_idle_timeout_s: float = 600.0
    engine_start_timeout_s: float = 300.0
    engine_stop_timeout_s: float = 60.0
    # One lease term: what an engine holds is given away then, so there is no reason to wait longer for the rest of it.
    engine_silence_s: float = 15.0
    # How long a launcher may not know of an engine whose start another replica of jobs has just written down.
    launch_grace_s: float = 60.0
    demand_s: float = 60.0
    min_engines: int = 0
    # Of one class, dedicated ones not counted.
    max_engines_per_base: int = 1
    max_engines: int = 4
    # False: somebody else starts engines.
    can_launch: bool = True


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the policy looks at.

    running: jobs in a leased state. newer: unfinished jobs that only newer replicas can read. quotas: project -> how
    many may run; 0 or absent means no limit. attempts: engine id -> attempts it holds. alone: engines that run a job
    which must be alone. lost: engine id -> when it was given up.
    """

    now: datetime
    queued: Sequence[Job] = ()
    running: Sequence[Job] = ()
    engines: Sequence[EngineRecord] = ()
    pools: Sequence[Pool] = ()
    attempts: Mapping[str, int] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()
    newer: Sequence[NewerJob] = ()
    quotas: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, datetime] = field(default_factory=dict)
    limits: Limits = Limits()
    # False just after an outage of ours, when an engine's silence proves nothing.
    trusted: bool = True

    @property
    def holders(self) -> Sequence[Running]:
        """Every job that holds a place."""
        return [*self.running, *(job for job in self.newer if job.leased)]


@dataclass(frozen=True, slots=True)
class Launch:
    base: BaseRef
    place: Place
    workers: int = 1


@dataclass(frozen=True, slots=True)
class StopEngine:
    """force: end the process; otherwise tell it in its next heartbeat's answer. failed: it could not start."""

    engine_id: str
    reason: str
    force: bool = False
    failed: bool = False


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
    place: Place, queued: Sequence[Job], running: Sequence[Running], quotas: Mapping[str, int], now: datetime
) -> Job | None:
    """The job that an engine of this place should take.

    Among the projects with room in their quota the one with the fewest running jobs; the oldest of its jobs. One whose
    turn had come before, but for which there was not enough room, goes before them.
    """
    counts = running_counts(running)
    ready = [
        job
        for job in queued
        if job.place == place
        and job.hyperparameters is not None
        and (job.hold_until is None or job.hold_until <= now)
        and within_quota(job.project, counts, quotas)
    ]
    return min(ready, key=lambda job: turn(job, counts), default=None)


def turn(job: Job, counts: Mapping[str, int]) -> tuple[bool, int, datetime, str]:
    """Sorts waiting jobs by whose turn it is. counts: project -> running jobs."""
    return (job.turn_time is None, counts.get(job.project, 0), job.queue_time or job.create_time, job.id)


def alone_on(attempts: Sequence[Attempt], running: Sequence[Running]) -> frozenset[str]:
    """The engines that run a job which must be alone. attempts: open ones."""
    alone = {job.id for job in running if job.alone}
    return frozenset(attempt.engine_id for attempt in attempts if attempt.job_id in alone)


def free_places(engine: EngineRecord, held: int, *, runs_alone: bool) -> int:
    """How many jobs the engine may take besides the attempts that it holds: none beside one that must be alone."""
    return 0 if runs_alone else max(0, engine.max_attempts - held)


def has_room(engine: EngineRecord, job: Job, held: int, *, runs_alone: bool) -> bool:
    """Whether an engine that holds so many attempts may take the job besides: one that must be alone needs it empty."""
    return free_places(engine, held, runs_alone=runs_alone) > (engine.max_attempts - 1 if job.alone else 0)


def line(queued: Sequence[Job], running: Sequence[Running]) -> list[Job]:
    """The waiting jobs in the order in which fair share would take them if none ended meanwhile."""
    counts = running_counts(running)
    # Of each project, the next one last; between the projects, the one whose next one it is.
    waiting: dict[str, list[Job]] = {}
    for job in sorted(queued, key=lambda one: turn(one, {}), reverse=True):
        waiting.setdefault(job.project, []).append(job)
    heads = [(turn(jobs[-1], counts), project) for project, jobs in waiting.items()]
    heapq.heapify(heads)
    order = []
    while heads:
        _, project = heads[0]
        jobs = waiting[project]
        order.append(jobs.pop())
        counts[project] = counts.get(project, 0) + 1
        if jobs:
            heapq.heapreplace(heads, (turn(jobs[-1], counts), project))
        else:
            heapq.heappop(heads)
    return order


def decide(picture: Snapshot) -> list[Decision]:
    """Launches, stops and reasons, in that order."""
    return [*_launches(picture), *_stops(picture), *_words(picture)]


def takes_work(engine: EngineRecord) -> bool:
    """Registered and staying, so that it may lease."""
    return engine.state is EngineState.READY and not engine.draining


def is_serving(engine: EngineRecord, now: datetime, limits: Limits) -> bool:
    """Registered, heard of lately and staying."""
    return (
        takes_work(engine)
        and engine.heartbeat_time is not None
        and (now - engine.heartbeat_time).total_seconds() <= limits.engine_silence_s
    )


def is_silent(engine: EngineRecord, now: datetime, limits: Limits) -> bool:
    """Registered, and not heard of for so long that it is given up. Ask only while jobs itself was in touch."""
    if engine.state is EngineState.LAUNCHING:
        return False
    return now - (engine.heartbeat_time or engine.create_time) > timedelta(seconds=limits.engine_silence_s)


def suspects(snapshot: Snapshot) -> tuple[str, ...]:
    """Engines lost or dead so lately that where they ran may be lost too, and still be taken for alive."""
    since = snapshot.now - timedelta(seconds=SUSPECT_S)
    return tuple(sorted(name for name, lost in snapshot.lost.items() if lost > since))


def end_of(engine: EngineRecord) -> str:
    """What it means that the engine's process is gone: one of lathe_engine_ends_total's whys."""
    ends = {EngineState.LAUNCHING: "failed", EngineState.READY: "died", EngineState.STOPPING: "stopped"}
    return ends[engine.state]


def waits_anew(engine: EngineRecord, waiting_for: str, now: datetime) -> bool:
    """Whether what a launching engine waits for is worth a write: other words, or the same for a while longer."""
    if waiting_for != engine.waiting_for:
        return True
    last = engine.waiting_time or engine.create_time
    return bool(waiting_for) and now - last > timedelta(seconds=WAITING_NOTED_EVERY_S)


def may_be_unknown(engine: EngineRecord, now: datetime, limits: Limits) -> bool:
    """Whether the launcher need not know the engine yet: whoever wrote it down may be about to start it."""
    age = (now - engine.create_time).total_seconds()
    return engine.state is EngineState.LAUNCHING and age <= limits.launch_grace_s


def backoff_s(failures: int) -> float:
    """Wait before the next try after so many failures in a row: 1, 2, 4 … 60 seconds."""
    return float(min(MAX_BACKOFF_S, 2 ** max(0, min(failures, 10) - 1)))


def running_counts(running: Sequence[Running]) -> dict[str, int]:
    """Project -> how many of its jobs hold a place."""
    counts: dict[str, int] = {}
    for job in running:
        counts[job.project] = counts.get(job.project, 0) + 1
    return counts


def within_quota(project: str, counts: Mapping[str, int], quotas: Mapping[str, int]) -> bool:
    """Whether one more job of the project may run."""
    limit = quotas.get(project, 0)
    return limit == 0 or counts.get(project, 0) < limit


def _wanted(picture: Snapshot) -> dict[Place, Launch]:
    """Engines that somebody waits for, oldest wish first."""
    counts = running_counts(picture.holders)
    wanted = {
        job.place: Launch(job.base, job.place, job.compute.workers)
        for job in line(picture.queued, picture.holders)
        if within_quota(job.project, counts, picture.quotas)
    }
    for pool in picture.pools:
        if pool.demand_time is not None:
            age = (picture.now - pool.demand_time).total_seconds()
            if age <= picture.limits.demand_s or picture.limits.min_engines:
                wanted.setdefault(pool.place, Launch(pool.base, pool.place))
    return wanted


def _launches(picture: Snapshot) -> list[Decision]:
    limits = picture.limits
    if not limits.can_launch:
        return []
    pools = {pool.place: pool for pool in picture.pools}
    total = sum(engine.launched for engine in picture.engines)
    decisions: list[Decision] = []
    for place, launch in _wanted(picture).items():
        pool = pools.get(place.shared)
        held = pool is not None and pool.next_launch_time is not None and pool.next_launch_time > picture.now
        if held or total >= limits.max_engines or not _needs_another(picture, place):
            continue
        decisions.append(launch)
        total += 1
    return decisions


def _needs_another(picture: Snapshot, place: Place) -> bool:
    engines = _of(picture.engines, place)
    coming = [engine for engine in engines if engine.state is EngineState.LAUNCHING]
    most = 1 if place.job_id else picture.limits.max_engines_per_base
    # A draining engine still has its memory and its cores: the next one waits for its end.
    if coming or len(engines) >= most:
        return False
    serving = [engine for engine in engines if is_serving(engine, picture.now, picture.limits)]
    if not serving:
        return True
    waiting = [job for job in line(picture.queued, picture.holders) if job.place == place]
    return not _all_fit(waiting, serving, picture)


def _all_fit(waiting: Sequence[Job], serving: Sequence[EngineRecord], picture: Snapshot) -> bool:
    """Whether all who wait find a place now, in their order: one that must be alone needs an empty engine, the others
    fill those first that are in use."""
    held = {engine.id: picture.attempts.get(engine.id, 0) for engine in serving}
    alone = set(picture.alone)
    for job in waiting:
        free = [e for e in serving if has_room(e, job, held[e.id], runs_alone=e.id in alone)]
        if not free:
            return False
        chosen = max(free, key=lambda engine: held[engine.id])
        held[chosen.id] += 1
        if job.alone:
            alone.add(chosen.id)
    return True


def _stops(picture: Snapshot) -> list[Decision]:
    decisions: list[Decision] = []
    wanted = _wanted(picture)
    known = {job.id for job in (*picture.queued, *picture.running)}
    unfinished = known | {job.id for job in picture.newer}
    staying: dict[Place, int] = {}
    for engine in picture.engines:
        if engine.state is EngineState.READY:
            staying[engine.place] = staying.get(engine.place, 0) + 1
    for engine in sorted(picture.engines, key=lambda e: e.busy_time or e.create_time):
        stop = _useless(engine, wanted, unfinished) or _stop(engine, picture)
        if stop is None or (stop.force and not picture.trusted):
            continue
        if not stop.force:
            least = 0 if engine.job_id else picture.limits.min_engines
            if engine.place in wanted or staying[engine.place] <= least:
                continue
            staying[engine.place] -= 1
        decisions.append(stop)
    return decisions


def _useless(
    engine: EngineRecord, wanted: Collection[Place], unfinished: Collection[str]
) -> StopEngine | None:
    """A job's own engine after that job; one that still waits for its start when nobody waits for it any more."""
    coming = engine.state is EngineState.LAUNCHING
    if engine.job_id and engine.job_id not in unfinished and engine.state is not EngineState.STOPPING:
        return StopEngine(engine.id, "its job needs it no more", force=coming)
    if coming and engine.waiting_for and engine.place not in wanted:
        return StopEngine(engine.id, "nobody waits for it any more", force=True)
    return None


def _stop(engine: EngineRecord, picture: Snapshot) -> StopEngine | None:
    limits = picture.limits

    def older(since: datetime, seconds: float) -> bool:
        return picture.now - since > timedelta(seconds=seconds)

    match engine.state:
        case EngineState.LAUNCHING:
            # What waits for a node or an image has not failed, however long it takes; its job says so meanwhile.
            since = max(engine.create_time, engine.waiting_time or engine.create_time)
            if not engine.waiting_for and older(since, limits.engine_start_timeout_s):
                return StopEngine(engine.id, "it did not register in time", force=True, failed=True)
        case EngineState.STOPPING if older(
            engine.stop_time or engine.create_time, limits.engine_stop_timeout_s
        ):
            return StopEngine(engine.id, "it did not end in time", force=True)
        case EngineState.READY:
            busy = picture.attempts.get(engine.id, 0) or engine.active_sequences or not engine.launched
            last = max(engine.busy_time or engine.create_time, _demand(engine, picture))
            if not busy and older(last, limits.engine_idle_timeout_s):
                return StopEngine(engine.id, "it had nothing to do")
    return None


def _demand(engine: EngineRecord, picture: Snapshot) -> datetime:
    times = [
        pool.demand_time
        for pool in picture.pools
        if pool.place == engine.place and pool.demand_time is not None
    ]
    return max(times, default=engine.create_time)


def _words(picture: Snapshot) -> list[Decision]:
    decisions: list[Decision] = []
    pools = {pool.place: pool for pool in picture.pools}
    counts = running_counts(picture.holders)
    ahead: dict[Place, int] = {}
    for job in line(picture.queued, picture.holders):
        before = ahead.get(job.place, 0)
        pool = pools.get(job.place.shared)
        mine = _of(picture.engines, job.place)
        serving = [engine for engine in mine if is_serving(engine, picture.now, picture.limits)]
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
        if within_quota(job.project, counts, picture.quotas):
            ahead[job.place] = before + 1
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


def _of(engines: Collection[EngineRecord], place: Place) -> list[EngineRecord]:
    return [engine for engine in engines if engine.place == place]


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
    if not within_quota(job.project, counts, picture.quotas):
        noun = "job" if limit == 1 else "jobs"
        return f"The project's quota of {limit} running {noun} is used up.{_when(job, picture, 0)}"
    if job.hold_until is not None and job.hold_until > picture.now:
        return "Waits a moment before it is tried again, because the last attempt met an error."
    if not serving:
        return _why_no_engine(job, picture, pool)
    if ahead == 0 and _all_fit([job], serving, picture):
        return "An engine with room will take it within seconds."
    place = "it is next in line" if ahead == 0 else f"{_roughly(ahead)} before it in line"
    return f"Waits for an engine for {job.base.id} with room; {place}.{_when(job, picture, ahead)}"


def _why_no_engine(job: Job, picture: Snapshot, pool: Pool | None) -> str:
    base, engines = job.base, _of(picture.engines, job.place)
    waiting = [engine.waiting_for for engine in engines if engine.waiting_for]
    if waiting:
        return f"The engine for {base.id} cannot start yet: {waiting[0]}"
    if engines:
        return f"An engine for {base.id} is starting or restarting; the job starts when it is ready."
    if not picture.limits.can_launch:
        return f"Waits for an engine for {base.id} to register; this platform does not start engines itself."
    if pool is not None and pool.last_error:
        return f"The engine for {base.id} could not start and is tried again; it last said: {pool.last_error}"
    if sum(engine.launched for engine in picture.engines) >= picture.limits.max_engines:
        return f"Waits for another engine to end; {picture.limits.max_engines} may run."
    return f"An engine for {base.id} is being started."


def _when(job: Job, picture: Snapshot, ahead: int) -> str:
    """When it will likely start, in words; empty when nothing is known.

    A place comes free when the first running job ends; each job before it takes as long as that one did.
    """
    known = [
        (other.estimated_finish_time, other)
        for other in picture.running
        if other.place == job.place and other.estimated_finish_time is not None
    ]
    if not known:
        return ""
    first, other = min(known, key=lambda pair: (pair[0], pair[1].id))
    whole = (first - (other.start_time or first)).total_seconds()
    seconds = max(0.0, (first - picture.now).total_seconds()) + ahead * max(0.0, whole)
    if seconds < 30:
        return " It will likely start within a minute."
    return f" It will likely start in about {_while(seconds)}."


# Coarse on purpose: sentences that changed with each second, or all of a long line's with each start, would be as many
# writes.


def _roughly(count: int) -> str:
    """`7`, `about 30`, `about 400`"""
    if count < 20:
        return str(count)
    step: int = 10 ** (len(str(count)) - 1)
    return f"about {step * round(count / step):,}"


def _while(seconds: float) -> str:
    """`3 minutes`, `45 minutes`, `5 hours`, `3 days`"""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 90:
        count, unit = minutes if minutes < 10 else 5 * round(minutes / 5), "minute"
    elif hours < 48:
        count, unit = hours, "hour"
    else:
        count, unit = round(seconds / 86400), "day"
    return f"{count} {unit}{'' if count == 1 else 's'}"
