"""When the waiting jobs start: the policy played on, each job taking as long as is expected of it. Pure.

Nothing here decides: policy.py says whose turn it is, what fits and what a quota lets run, as it does for a lease.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import count

from lathe.jobs import policy
from lathe.jobs.model import Attempt, EngineRecord, EngineState, Job, Place
from lathe.jobs.policy import Running


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that the next starts depend on. running: what holds a place; attempts: open ones; quotas: as in
    policy.Snapshot. A job lasts as its `estimate` says for the class that it asks for, a running one until its
    `estimated_finish_time`."""

    now: datetime
    queued: Sequence[Job] = ()
    running: Sequence[Running] = ()
    engines: Sequence[EngineRecord] = ()
    attempts: Sequence[Attempt] = ()
    quotas: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """seconds: from now; None where it hangs on a job whose end nobody knows."""

    job: Job
    seconds: float | None


def starts(scene: Scene) -> Iterator[Start]:
    """The waiting jobs in the order of their starts, without those that no engine of today will ever take.

    A dedicated job finds an engine of its own at once. Every other engine stays, and no new one comes.
    """
    return _Play(scene).run()


def seconds_until(job: Job, scene: Scene) -> float | None:
    """Until one of the waiting jobs starts; None if that is not known."""
    return next((start.seconds for start in starts(scene) if start.job.id == job.id), None)


@dataclass(slots=True)
class _Engine:
    record: EngineRecord
    held: int = 0
    runs_alone: bool = False

    @property
    def is_full(self) -> bool:
        return not policy.free_places(self.record, self.held, runs_alone=self.runs_alone)

    def fits(self, job: Job) -> bool:
        return policy.has_room(self.record, job, self.held, runs_alone=self.runs_alone)


# Of one project at one place: the next job first.
_Line = list[tuple[tuple[object, ...], Job]]


class _Play:
    """engines: in the order in which they ask for work when several may."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._seconds = 0.0
        self._counts = policy.running_counts(scene.running)
        self._engines = [_Engine(engine) for engine in scene.engines if policy.takes_work(engine)]
        self._engines += [_Engine(engine) for engine in _own_engines(scene)]
        self._lines: dict[Place, dict[str, _Line]] = {}
        # Where somebody works whose end is not known.
        self._endless: set[Place] = set()
        # (seconds, a number that makes them unlike, what happens then)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._take_up_running()
        for job in scene.queued:
            if job.hyperparameters is None:
                continue
            if job.hold_until is not None and job.hold_until > scene.now:
                self._at((job.hold_until - scene.now).total_seconds(), partial(self._wait, job))
            else:
                self._wait(job)

    def run(self) -> Iterator[Start]:
        while True:
            yield from self._take()
            if not self._events:
                return
            self._seconds = self._events[0][0]
            while self._events and self._events[0][0] <= self._seconds:
                heapq.heappop(self._events)[2]()

    def _take_up_running(self) -> None:
        engines = {engine.record.id: engine for engine in self._engines}
        jobs = {job.id: job for job in self._scene.running}
        alone = policy.alone_on(self._scene.attempts, self._scene.running)
        for attempt in self._scene.attempts:
            engine = engines.get(attempt.engine_id)
            if engine is not None:
                engine.held += 1
                engine.runs_alone = engine.record.id in alone
            job = jobs.get(attempt.job_id)
            end = job.estimated_finish_time if isinstance(job, Job) else None
            if job is not None and end is not None:
                left = max(0.0, (end - self._scene.now).total_seconds())
                self._at(left, partial(self._end, job.project, engine))
            elif engine is not None:
                self._endless.add(engine.record.place)

    def _at(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._numbers), then))

    def _wait(self, job: Job) -> None:
        line = self._lines.setdefault(job.place, {}).setdefault(job.project, [])
        heapq.heappush(line, (policy.turn(job, {}), job))

    def _take(self) -> Iterator[Start]:
        """What engines take now. Each start may let another engine take what it could not before: ask all again."""
        again = True
        while again:
            again = False
            for engine in self._engines:
                while not engine.is_full and (job := self._next(engine)) is not None:
                    again = True
                    yield self._start(job, engine)

    def _next(self, engine: _Engine) -> Job | None:
        heads = [
            line[0][1]
            for project, line in self._lines.get(engine.record.place, {}).items()
            if line and policy.within_quota(project, self._counts, self._scene.quotas)
        ]
        job = min(heads, key=lambda one: policy.turn(one, self._counts), default=None)
        if job is None or engine.fits(job):
            return job
        if job.turn_time is None:
            self._leave_line(job)
            self._wait(replace(job, turn_time=self._scene.now))
        return None

    def _leave_line(self, job: Job) -> None:
        heapq.heappop(self._lines[job.place][job.project])

    def _start(self, job: Job, engine: _Engine) -> Start:
        self._leave_line(job)
        known = not self._seconds or job.place not in self._endless
        self._counts[job.project] = self._counts.get(job.project, 0) + 1
        engine.held += 1
        engine.runs_alone = job.alone
        taken = job.estimate.engines[0].seconds if job.estimate is not None else None
        if taken is None:
            self._endless.add(job.place)
        else:
            self._at(self._seconds + taken.likely, partial(self._end, job.project, engine))
        return Start(job, self._seconds if known else None)

    def _end(self, project: str, engine: _Engine | None) -> None:
        self._counts[project] -= 1
        if engine is not None:
            engine.held -= 1
            # Who is alone has nobody beside it.
            engine.runs_alone = False


def _own_engines(scene: Scene) -> Iterator[EngineRecord]:
    """One for each dedicated job that waits and has none yet."""
    there = {engine.place for engine in scene.engines if policy.takes_work(engine)}
    for job in scene.queued:
        if job.place.job_id and job.place not in there:
            yield EngineRecord(
                id=job.id,
                base=job.base,
                state=EngineState.READY,
                create_time=scene.now,
                max_attempts=1,
                engine_class=job.compute.engine_class,
                job_id=job.id,
            )
