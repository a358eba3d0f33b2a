"""Decisions from pictures."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.jobs import hyperparameters, policy
from lathe.jobs.model import (
    Attempt,
    BaseRef,
    DatasetRef,
    EngineRecord,
    EngineState,
    Job,
    JobState,
    NewerJob,
    Place,
    Pool,
)
from lathe.jobs.policy import Explain, Launch, Limits, Refuse, Snapshot, StopEngine
from lathe.jobs.training import AUTO
from tests.fakes.jobs import BASE, OTHER

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def job(name: str, project: str = "acme", age: float = 60, base: BaseRef = BASE, **fields: object) -> Job:
    made = Job(
        name,
        project,
        base.id,
        base,
        DatasetRef("f"),
        1,
        ago(age),
        state=JobState.QUEUED,
        queue_time=ago(age),
        hyperparameters=hyperparameters.resolve(AUTO, base, 100),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def engine(name: str = "eng-a", base: BaseRef = BASE, **fields: object) -> EngineRecord:
    made = EngineRecord(
        name,
        base,
        EngineState.READY,
        ago(3600),
        launched=True,
        address="a:1",
        max_attempts=1,
        heartbeat_time=ago(1),
        busy_time=ago(1),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def only(decisions: list[policy.Decision], kind: type) -> list[object]:
    return [decision for decision in decisions if isinstance(decision, kind)]


def reason(picture: Snapshot, job_id: str) -> str:
    found = [d for d in policy.decide(picture) if isinstance(d, Explain) and d.job_id == job_id]
    return found[0].reason


def test_the_oldest_job_of_the_least_busy_project_is_next() -> None:
    queued = [job("a", "acme", 90), job("b", "beta", 60), job("c", "beta", 80)]
    assert policy.next_job(Place(BASE.digest), queued, [], {}, NOW) == queued[0]
    assert policy.next_job(Place(BASE.digest), queued, [job("r", "acme")], {}, NOW) == queued[2]
    assert [j.id for j in policy.line(queued, [])] == ["a", "c", "b"]


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.booleans()), max_size=12),
    st.lists(st.sampled_from("abcd"), max_size=4),
)
def test_the_line_is_one_turn_after_the_other(
    waiting: list[tuple[str, int, bool]], running: list[str]
) -> None:
    queued = [
        job(f"j{n}", project, age, turn_time=NOW if turned else None)
        for n, (project, age, turned) in enumerate(waiting)
    ]
    there = [job(f"r{n}", project) for n, project in enumerate(running)]
    expected: list[Job] = []
    while len(expected) < len(queued):
        rest = [one for one in queued if one not in expected]
        chosen = policy.next_job(Place(BASE.digest), rest, [*there, *expected], {}, NOW)
        assert chosen is not None
        expected.append(chosen)
    assert policy.line(queued, there) == expected


class Counted(datetime):
    """A time that counts how often it was compared."""

    compared = 0

    def __lt__(self, other: datetime) -> bool:
        Counted.compared += 1
        return super().__lt__(other)

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return super().__eq__(other)

    __hash__ = datetime.__hash__


def test_a_line_of_ten_times_as_many_takes_little_more_than_ten_times_as_long() -> None:
    def compared(jobs: int) -> int:
        times = [Counted.fromtimestamp(1e9 + n * 7919 % jobs, UTC) for n in range(jobs)]
        queued = [job(f"j{n}", f"p{n % 50}", queue_time=time) for n, time in enumerate(times)]
        Counted.compared = 0
        assert len(policy.line(queued, [])) == jobs
        return Counted.compared

    assert compared(3000) < 15 * compared(300)


def test_a_job_whose_turn_came_goes_before_projects_with_fewer_running_jobs() -> None:
    waiting = [job("a", rerun_of="z", turn_time=NOW), job("b", "beta", 90)]
    assert policy.next_job(Place(BASE.digest), waiting, [job("r")], {}, NOW) == waiting[0]
    assert policy.line(waiting, [job("r")]) == waiting
    # Its quota holds all the same.
    assert policy.next_job(Place(BASE.digest), waiting, [job("r")], {"acme": 1}, NOW) == waiting[1]


def test_a_job_that_must_be_alone_waits_until_its_engine_is_empty() -> None:
    rerun = job("b", rerun_of="a")
    several = engine(max_attempts=4)
    assert rerun.alone

    def room(waiting: Job, held: int, *, runs_alone: bool = False) -> bool:
        return policy.has_room(several, waiting, held, runs_alone=runs_alone)

    assert [room(rerun, held) for held in (0, 1)] == [True, False]
    assert [room(job("c"), held) for held in (0, 3, 4)] == [True, True, False]
    assert not room(job("c"), 1, runs_alone=True)
    picture = Snapshot(NOW, queued=[rerun], engines=[several], attempts={several.id: 1})
    assert "it is next in line" in reason(picture, "b")


def test_an_engine_that_runs_a_job_alone_has_no_room_and_another_one_starts() -> None:
    whole = job("w", rerun_of="z", state=JobState.RUNNING, attempt_id="att-1")
    several = engine(max_attempts=4)
    held = Attempt("att-1", "w", 1, several.id, "t", NOW, NOW)
    picture = Snapshot(
        NOW,
        queued=[job("c")],
        running=[whole],
        engines=[several],
        attempts={several.id: 1},
        alone=policy.alone_on([held], [whole]),
        limits=Limits(max_engines_per_base=2),
    )
    assert picture.alone == {several.id}
    assert "it is next in line" in reason(picture, "c")
    assert only(policy.decide(picture), Launch) == [Launch(BASE, Place(BASE.digest))]
    assert not only(policy.decide(replace(picture, alone=frozenset())), Launch)


def test_an_engine_starts_for_a_job_that_must_be_alone() -> None:
    several, rerun = engine(max_attempts=4), job("b", rerun_of="a")
    picture = Snapshot(
        NOW,
        queued=[rerun],
        running=[job("r")],
        engines=[several],
        attempts={several.id: 1},
        limits=Limits(max_engines_per_base=2),
    )
    assert only(policy.decide(picture), Launch)
    idle = engine("eng-b", max_attempts=4)
    # The idle one is for the rerun; the others fill the one in use, the fourth of them has no place.
    for others, launches in ((3, 0), (4, 1)):
        waiting = [*(job(f"c{n}", age=90) for n in range(others)), rerun]
        crowded = replace(
            picture, queued=waiting, engines=[several, idle], limits=Limits(max_engines_per_base=3)
        )
        assert len(only(policy.decide(crowded), Launch)) == launches


def test_a_job_that_only_a_newer_replica_reads_holds_its_place() -> None:
    newer = NewerJob("n", "acme", leased=True)
    held = Attempt("att-1", "n", 1, "eng-a", "t", NOW, NOW)
    assert policy.alone_on([held], [newer]) == {"eng-a"}
    assert policy.next_job(Place(BASE.digest), [job("a")], [newer], {"acme": 1}, NOW) is None
    own = engine(job_id="n", state=EngineState.LAUNCHING, create_time=ago(5), heartbeat_time=None)
    assert only(policy.decide(Snapshot(NOW, engines=[own])), StopEngine)
    assert not only(policy.decide(Snapshot(NOW, engines=[own], newer=[newer])), StopEngine)


def test_quota_base_and_back_off_are_kept() -> None:
    waiting = job("a")
    assert policy.next_job(Place(OTHER.digest), [waiting], [], {}, NOW) is None
    assert policy.next_job(Place(BASE.digest), [waiting], [job("r")], {"acme": 1}, NOW) is None
    assert policy.next_job(Place(BASE.digest), [waiting], [], {"acme": policy.UNKNOWN_QUOTA}, NOW) is None
    held = replace(waiting, hold_until=NOW + timedelta(seconds=1))
    assert policy.next_job(Place(BASE.digest), [held], [], {}, NOW) is None


def test_an_engine_is_launched_once_for_a_waiting_job() -> None:
    picture = Snapshot(NOW, queued=[job("a"), job("b")])
    assert only(policy.decide(picture), Launch) == [Launch(BASE, Place(BASE.digest))]
    coming = engine(state=EngineState.LAUNCHING, create_time=ago(5), heartbeat_time=None)
    assert not only(policy.decide(replace(picture, engines=[coming])), Launch)
    assert not only(policy.decide(replace(picture, limits=Limits(can_launch=False))), Launch)
    held = Pool(BASE, next_launch_time=NOW + timedelta(seconds=5))
    assert not only(policy.decide(replace(picture, pools=[held])), Launch)


def test_a_second_base_gets_its_own_engine_within_the_limit() -> None:
    picture = Snapshot(NOW, queued=[job("a", base=OTHER)], engines=[engine()], attempts={"eng-a": 1})
    assert only(policy.decide(picture), Launch) == [Launch(OTHER, Place(OTHER.digest))]
    full = replace(picture, limits=Limits(max_engines=1))
    assert not only(policy.decide(full), Launch)
    assert "another engine to end" in reason(full, "a")


def test_more_engines_start_only_when_the_pool_may_grow() -> None:
    picture = Snapshot(NOW, queued=[job("a")], engines=[engine()], attempts={"eng-a": 1})
    assert not only(policy.decide(picture), Launch)
    assert only(policy.decide(replace(picture, limits=Limits(max_engines_per_base=2))), Launch)


def test_a_request_for_sampling_launches_for_a_while() -> None:
    fresh = Snapshot(NOW, pools=[Pool(BASE, demand_time=ago(5))])
    assert only(policy.decide(fresh), Launch) == [Launch(BASE, Place(BASE.digest))]
    assert not policy.decide(Snapshot(NOW, pools=[Pool(BASE, demand_time=ago(500))]))


@pytest.mark.parametrize(
    ("changed", "stops"),
    [
        ({}, True),
        ({"busy_time": ago(10)}, False),
        ({"active_sequences": 1}, False),
        ({"launched": False}, False),
    ],
)
def test_an_idle_engine_is_told_to_end(changed: dict[str, object], stops: bool) -> None:
    idle = replace(engine(busy_time=ago(700)), **changed)  # type: ignore[arg-type]
    decisions = policy.decide(Snapshot(NOW, engines=[idle]))
    assert decisions == ([StopEngine("eng-a", "it had nothing to do")] if stops else [])


def test_an_idle_engine_stays_for_work_demand_and_the_minimum() -> None:
    idle = engine(busy_time=ago(700))
    assert not only(policy.decide(Snapshot(NOW, engines=[idle], queued=[job("a")])), StopEngine)
    assert not policy.decide(Snapshot(NOW, engines=[idle], attempts={"eng-a": 1}))
    assert not policy.decide(Snapshot(NOW, engines=[idle], pools=[Pool(BASE, demand_time=ago(300))]))
    assert not policy.decide(Snapshot(NOW, engines=[idle], limits=Limits(min_engines=1)))


@pytest.mark.parametrize(
    "stuck",
    [
        engine(state=EngineState.LAUNCHING, create_time=ago(301)),
        engine(state=EngineState.STOPPING, stop_time=ago(61)),
    ],
)
def test_a_stuck_engine_is_ended_by_force(stuck: EngineRecord) -> None:
    [decision] = only(policy.decide(Snapshot(NOW, engines=[stuck])), StopEngine)
    assert isinstance(decision, StopEngine) and decision.force


def test_a_job_says_why_it_waits_and_how_long() -> None:
    busy = job("r", estimated_finish_time=NOW + timedelta(minutes=3), start_time=ago(120))
    full = Snapshot(NOW, [job("a", age=90), job("b", age=80)], [busy], [engine()], attempts={"eng-a": 1})
    assert reason(full, "a") == (
        "Waits for an engine for tiny with room; it is next in line. It will likely start in about 3 minutes."
    )
    assert reason(full, "b").endswith("1 before it in line. It will likely start in about 8 minutes.")
    assert reason(replace(full, quotas={"acme": 1}), "a").startswith(
        "The project's quota of 1 running job is"
    )
    assert "is being started" in reason(Snapshot(NOW, [job("a")]), "a")
    assert "within seconds" in reason(Snapshot(NOW, [job("a")], engines=[engine()]), "a")
    failing = Snapshot(NOW, [job("a")], pools=[Pool(BASE, start_failures=2, last_error="no disk")])
    assert reason(failing, "a").endswith("it last said: no disk")
    known = job("a", state_reason=reason(Snapshot(NOW, [job("a")]), "a"))
    assert not only(policy.decide(Snapshot(NOW, [known])), Explain)


@pytest.mark.parametrize(
    ("ahead", "minutes", "words"),
    [
        (1, 0.4, "1 before it in line. It will likely start within a minute."),
        (19, 1.2, "19 before it in line. It will likely start in about 1 minute."),
        (27, 44, "about 30 before it in line. It will likely start in about 45 minutes."),
        (1234, 170, "about 1,000 before it in line. It will likely start in about 3 hours."),
        (3, 60 * 70, "3 before it in line. It will likely start in about 3 days."),
    ],
)
def test_a_long_wait_is_told_roughly(ahead: int, minutes: float, words: str) -> None:
    busy = job("r", estimated_finish_time=NOW + timedelta(minutes=minutes))
    waiting = [job(f"j{n:04}", age=3000 - n) for n in range(ahead + 1)]
    full = Snapshot(NOW, waiting, [busy], [engine()], attempts={"eng-a": 1})
    assert reason(full, waiting[-1].id).endswith(words)


def test_a_start_changes_few_sentences_of_a_long_line() -> None:
    busy = job("r", start_time=ago(600), estimated_finish_time=NOW + timedelta(minutes=3))
    waiting = [job(f"j{n:04}", age=3000 - n) for n in range(2000)]
    picture = Snapshot(NOW, waiting, [busy], [engine()], attempts={"eng-a": 1})
    told = {d.job_id: d.reason for d in only(policy.decide(picture), Explain) if isinstance(d, Explain)}
    after = [replace(one, state_reason=told[one.id]) for one in waiting[1:]]
    later = replace(
        picture,
        queued=after,
        running=[replace(busy, start_time=ago(0), estimated_finish_time=NOW + timedelta(minutes=13))],
    )
    assert len(only(policy.decide(later), Explain)) < 100


def test_a_base_that_never_starts_fails_its_jobs() -> None:
    broken = Pool(BASE, start_failures=policy.MAX_START_FAILURES, last_error="out of memory")
    [refused] = only(policy.decide(Snapshot(NOW, [job("a")], pools=[broken])), Refuse)
    assert isinstance(refused, Refuse)
    assert refused.reason.endswith("5 times in a row while it started; it last said: out of memory")
