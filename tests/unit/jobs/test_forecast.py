"""When waiting jobs start, held against the policy itself."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.jobs import forecast, hyperparameters, policy
from lathe.jobs.figures import EngineEstimate, JobEstimate, Range
from lathe.jobs.forecast import Scene
from lathe.jobs.model import Attempt, ComputeSpec, DatasetRef, EngineRecord, EngineState, Job, JobState
from lathe.jobs.training import AUTO
from tests.fakes.jobs import BASE, OTHER

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
CHOSEN = hyperparameters.resolve(AUTO, BASE, 100)


def job(
    name: str, project: str = "acme", taken: float | None = 60.0, age: float = 60, **fields: object
) -> Job:
    seconds = Range(taken, taken, taken) if taken is not None else None
    made = Job(
        name,
        project,
        BASE.id,
        BASE,
        DatasetRef("f"),
        1,
        NOW - timedelta(seconds=age),
        state=JobState.QUEUED,
        queue_time=NOW - timedelta(seconds=age),
        hyperparameters=CHOSEN,
        estimate=JobEstimate(1, 1, 1, 1, 1, 1, 1, 0, (EngineEstimate("default", seconds=seconds),)),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def engine(name: str = "eng-a", places: int = 1, **fields: object) -> EngineRecord:
    made = EngineRecord(name, BASE, EngineState.READY, NOW, max_attempts=places, heartbeat_time=NOW)
    return replace(made, **fields)  # type: ignore[arg-type]


def running(name: str, left: float | None, project: str = "acme", **fields: object) -> Job:
    end = NOW + timedelta(seconds=left) if left is not None else None
    return job(
        name, project, state=JobState.RUNNING, attempt_id=f"att-{name}", estimated_finish_time=end, **fields
    )


def held(one: Job, on: str = "eng-a") -> Attempt:
    return Attempt(one.attempt_id, one.id, 1, on, "t", NOW, NOW)


def scene(queued: Sequence[Job], *ends: float | None, places: int | None = None, **fields: object) -> Scene:
    """One engine; jobs run on it that end so many seconds from now."""
    there = [running(f"r{n}", left) for n, left in enumerate(ends)]
    engines = [engine(places=len(ends) if places is None else places)]
    made = Scene(NOW, queued, there, engines, [held(one) for one in there])
    return replace(made, **fields)  # type: ignore[arg-type]


def seconds(found: Scene) -> dict[str, float | None]:
    return {start.job.id: start.seconds for start in forecast.starts(found)}


@pytest.mark.parametrize(
    ("ends", "ahead", "expected"),
    [
        ((), (), None),
        ((30.0, 10.0), (), 10.0),
        ((30.0, 10.0), (60.0,), 30.0),
        ((30.0, 10.0), (60.0, 5.0), 35.0),
        ((30.0, None), (), None),
        ((30.0, 10.0), (None,), None),
    ],
)
def test_the_wait_is_until_a_place_is_free(
    ends: tuple[float | None, ...], ahead: tuple[float | None, ...], expected: float | None
) -> None:
    before = [job(f"a{n}", taken=taken, age=90) for n, taken in enumerate(ahead)]
    mine = job("mine")
    assert forecast.seconds_until(mine, scene([*before, mine], *ends)) == expected


def test_a_free_place_is_taken_at_once_whatever_else_is_unknown() -> None:
    assert seconds(scene([job("a")], None, places=2)) == {"a": 0.0}


def test_beside_a_job_that_must_be_alone_there_is_no_place() -> None:
    whole = running("w", 40.0, rerun_of="z")
    alone = scene([job("a"), job("b")], places=4, running=[whole], attempts=[held(whole)])
    assert seconds(alone) == {"a": 40.0, "b": 40.0}


def test_one_that_must_be_alone_waits_for_the_last_and_nobody_passes_it() -> None:
    waiting = [job("w", age=90, rerun_of="z", taken=5.0), job("a")]
    assert seconds(scene(waiting, 20.0, 30.0, places=4)) == {"w": 30.0, "a": 35.0}
    # What is not its turn yet holds nobody up.
    less_busy = [*waiting, job("b", "beta", taken=50.0)]
    assert seconds(scene(less_busy, 20.0, 30.0, places=4)) == {"b": 0.0, "w": 50.0, "a": 55.0}


def test_a_used_up_quota_is_waited_for() -> None:
    waiting = [job("a", taken=10.0), job("b"), job("c", "beta")]
    found = scene(waiting, 50.0, places=3, quotas={"acme": 1})
    assert seconds(found) == {"c": 0.0, "a": 50.0, "b": 60.0}
    unknown = scene(waiting, 50.0, places=3, quotas={"acme": policy.UNKNOWN_QUOTA})
    assert seconds(unknown) == {"c": 0.0}


def test_a_quota_is_used_up_by_jobs_elsewhere_too() -> None:
    elsewhere = running("r", 50.0, base=OTHER)
    away = scene(
        [job("a")], places=1, running=[elsewhere], attempts=[held(elsewhere, "eng-o")], quotas={"acme": 1}
    )
    assert seconds(away) == {"a": 50.0}


def test_a_dedicated_job_waits_for_its_quota_alone() -> None:
    mine = job("a", compute=ComputeSpec(dedicated=True))
    assert seconds(scene([mine], 50.0)) == {"a": 0.0}
    assert seconds(scene([mine], 50.0, quotas={"acme": 1})) == {"a": 50.0}


def test_a_job_that_is_tried_again_later_is_passed() -> None:
    late = job("a", age=90, hold_until=NOW + timedelta(seconds=5))
    assert seconds(scene([late, job("b", taken=10.0)], places=1)) == {"b": 0.0, "a": 10.0}


def test_an_engine_that_leaves_takes_nothing() -> None:
    assert seconds(scene([job("a")], engines=[engine(draining=True)])) == {}


class Played:
    """The starts as leases give them, the engines asking in turn: what WorkersService.lease does, without a store."""

    def __init__(self, found: Scene, ends: dict[str, float]) -> None:
        self._found, self._ends, self._now = found, ends, 0.0
        self._queued = {one.id: one for one in found.queued}
        on = {attempt.job_id: attempt.engine_id for attempt in found.attempts}
        self._working = {one.id: (one, on[one.id]) for one in found.running if isinstance(one, Job)}
        self.starts: list[tuple[str, float]] = []

    def run(self) -> list[tuple[str, float]]:
        while True:
            while sum(self._lease(one) for one in self._found.engines):
                pass
            if not self._working:
                return self.starts
            self._now = min(self._ends[name] for name in self._working)
            self._working = {k: v for k, v in self._working.items() if self._ends[k] > self._now}

    def _lease(self, one: EngineRecord) -> bool:
        """Take all that it may; whether that was anything."""
        took = False
        while True:
            jobs = [working for working, _ in self._working.values()]
            mine = [
                Attempt("a", job.id, 1, on, "t", NOW, NOW)
                for job, on in self._working.values()
                if on == one.id
            ]
            alone = bool(policy.alone_on(mine, jobs))
            if not policy.free_places(one, len(mine), runs_alone=alone):
                return took
            at = NOW + timedelta(seconds=self._now)
            chosen = policy.next_job(one.place, [*self._queued.values()], jobs, self._found.quotas, at)
            if chosen is None:
                return took
            if not policy.has_room(one, chosen, len(mine), runs_alone=alone):
                self._queued[chosen.id] = replace(chosen, turn_time=at)
                return took
            took = True
            del self._queued[chosen.id]
            self._working[chosen.id] = (chosen, one.id)
            self.starts.append((chosen.id, self._now))
            assert chosen.estimate is not None and chosen.estimate.engines[0].seconds is not None
            self._ends[chosen.id] = self._now + chosen.estimate.engines[0].seconds.likely


lengths = st.integers(1, 9).map(float)
projects = st.sampled_from(["acme", "beta", "gamma"])
waiting = st.lists(
    st.tuples(projects, lengths, st.integers(1, 50), st.booleans(), st.sampled_from([BASE, OTHER])),
    max_size=14,
)


@given(
    waiting,
    st.lists(st.tuples(projects, lengths), max_size=3),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([BASE, OTHER])), min_size=1, max_size=3),
    st.dictionaries(projects, st.integers(0, 2)),
)
def test_jobs_start_in_the_order_and_at_the_time_that_was_said(
    queued: list[tuple[str, float, int, bool, object]],
    there: list[tuple[str, float]],
    engines: list[tuple[int, object]],
    quotas: dict[str, int],
) -> None:
    jobs = [
        job(f"q{n:02}", project, taken, age, rerun_of="z" if alone else "", base=base)
        for n, (project, taken, age, alone, base) in enumerate(queued)
    ]
    busy = [running(f"r{n}", left, project) for n, (project, left) in enumerate(there)]
    records = [
        engine("eng-0", places=3),
        *(engine(f"eng-{n}", places, base=base) for n, (places, base) in enumerate(engines, start=1)),
    ]
    found = Scene(NOW, jobs, busy, records, [held(one, "eng-0") for one in busy], quotas)
    said = [(start.job.id, start.seconds) for start in forecast.starts(found)]
    assert said == Played(found, {f"r{n}": left for n, (_, left) in enumerate(there)}).run()
