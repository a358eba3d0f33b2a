"""Estimates of jobs, asked for and on the job."""

from dataclasses import replace
from datetime import timedelta

import pytest

from lathe.common.errors import InvalidArgument, NotFound, Unavailable
from lathe.jobs.figures import Basis, Prices, ReplacedPrompt
from lathe.jobs.model import ComputeSpec, EngineClasses, JobState, Outcome
from lathe.jobs.ports import Audit, AuditState, FileFinding, Quota
from lathe.jobs.progress import Note
from lathe.jobs.requests import JobRequest
from lathe.jobs.settings import JobsSettings
from lathe.jobs.training import TrainingSpec
from lathe.jobs.workers import Beat
from tests.fakes.jobs import USER, World, measured

REQUEST = JobRequest(project="acme", model="tiny", training="file-1", spec=TrainingSpec(n_epochs=2))


async def run_one(world: World, engine: str = "eng-a") -> None:
    """A job of 4 steps of 2 s and 100 tokens/s each."""
    lease = await world.leased(engine)
    rows = [replace(measured(step), tokens_per_second=100.0) for step in (1, 2, 3, 4)]
    await world.report(lease, metrics=rows)
    # The same report again, as after a lost answer.
    await world.report(lease, metrics=rows)
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()


async def test_what_jobs_did_is_what_the_next_is_estimated_by(world: World) -> None:
    await run_one(world)
    async with world.store.read() as session:
        (speed,) = await session.speeds(10)
    assert (speed.tokens, speed.seconds, speed.steps) == (800.0, 8.0, 4)
    found = (await world.estimates.estimate(REQUEST, None, USER)).estimate
    assert found is not None
    # 100 rows of 50 tokens, 10 of them trained.
    assert (found.tokens_per_epoch, found.tokens, found.trained_tokens) == (5000, 10_000, 2000)
    assert (found.steps, found.batch_size) == (26, 8)
    engine = found.engines[0]
    assert engine.seconds is not None and (engine.seconds.likely, engine.seconds.basis) == (
        100.0,
        Basis.MEASURED,
    )
    assert engine.queue_seconds == 0.0


async def test_the_memory_that_an_engine_measured_is_kept_and_no_event(world: World) -> None:
    lease = await world.leased()
    await world.workers.heartbeat(
        Beat("eng-a", [(lease.attempt.id, lease.attempt.lease_token)], memory_bytes=1000)
    )
    await world.report(
        lease, notes=[Note(0, "memory", "It takes so much.", {"bytes": "50", "tokens": "320"})]
    )
    await world.report(lease, metrics=[replace(measured(1), tokens_per_second=100.0)])
    assert "It takes so much." not in await world.messages(lease.job.id)
    found = (await world.estimates.estimate(REQUEST, None, USER)).estimate
    assert found is not None and found.engines[0].memory_bytes is not None
    assert (found.engines[0].memory_bytes.likely, found.engines[0].memory_bytes.basis) == (
        1050,
        Basis.MEASURED,
    )


@pytest.mark.parametrize("data", [{}, {"bytes": "-1", "tokens": "2"}, {"bytes": "9" * 40, "tokens": "2"}])
async def test_memory_that_is_no_number_is_not_kept(world: World, data: dict[str, str]) -> None:
    lease = await world.leased()
    await world.report(lease, notes=[Note(0, "memory", "?", data)])
    async with world.store.read() as session:
        assert not await session.speeds(1)


async def test_the_job_keeps_its_estimate_and_says_when_it_will_be_done(world: World) -> None:
    await run_one(world)
    job = await world.queued(spec=TrainingSpec(n_epochs=2))
    assert job.state is JobState.QUEUED and job.estimate is not None
    assert job.estimated_finish_time == world.clock.now() + timedelta(seconds=100)
    second = await world.queued(spec=TrainingSpec(n_epochs=2))
    # The first one is before it.
    assert second.estimated_finish_time == world.clock.now() + timedelta(seconds=200)


async def test_the_wait_knows_quotas_and_places(world: World) -> None:
    await run_one(world)
    await world.register("eng-b")
    world.accounts.quota = Quota(max_running_jobs=1)
    await world.queued(spec=TrainingSpec(n_epochs=2))
    lease = await world.workers.lease("eng-a")
    assert lease is not None
    # A place is free, but not for this project; a dedicated job waits for the quota as well.
    for compute in (ComputeSpec(), ComputeSpec(dedicated=True)):
        found = (await world.estimates.estimate(replace(REQUEST, compute=compute), None, USER)).estimate
        assert found is not None and found.engines[0].queue_seconds == 100.0
    other, there = replace(USER, project="beta"), replace(REQUEST, project="beta")
    found = (await world.estimates.estimate(there, None, other)).estimate
    assert found is not None and found.engines[0].queue_seconds == 0.0
    world.accounts.down = Unavailable("away")
    world.start()
    found = (await world.estimates.estimate(REQUEST, None, USER)).estimate
    assert found is not None and found.engines[0].queue_seconds is None


async def test_nothing_is_guessed_of_engines_that_never_were(world: World) -> None:
    job = await world.queued()
    assert job.estimate is not None and job.estimate.engines[0].seconds is None
    assert job.estimated_finish_time is None and job.estimate.engines[0].queue_seconds is None


async def test_each_class_is_shown_with_its_price(world: World) -> None:
    world.classes, world.prices = (
        EngineClasses(("default", "gpu"), "default"),
        Prices("EUR", {"default": 36.0}),
    )
    world.start()
    await run_one(world)
    request = replace(REQUEST, compute=ComputeSpec("gpu"))
    answer = await world.estimates.estimate(request, ReplacedPrompt(seconds_saved=1.0), USER)
    assert answer.estimate is not None
    gpu, default = answer.estimate.engines
    assert (gpu.engine_class, gpu.seconds, gpu.price) == ("gpu", None, None)
    assert default.price is not None and default.price.likely == 1.0
    assert answer.break_even is not None and answer.break_even.requests is None
    answer = await world.estimates.estimate(REQUEST, ReplacedPrompt(seconds_saved=1.0), USER)
    assert answer.break_even is not None and answer.break_even.requests == 100


async def test_it_is_pending_while_the_files_are_audited(world: World) -> None:
    world.datasets.audits["file-1"] = Audit("k", AuditState.RUNNING)
    assert (await world.estimates.estimate(REQUEST, None, USER)).estimate is None


async def test_files_that_cannot_be_trained_on_are_refused_by_line(world: World) -> None:
    finding = FileFinding(7, "messages", "no_trained_tokens", "Nothing is trained.")
    world.datasets.audits["file-1"] = Audit("k", AuditState.ERROR, findings=(finding,), finding_count=1)
    with pytest.raises(InvalidArgument, match="line 7") as raised:
        await world.estimates.estimate(REQUEST, None, USER)
    assert [one.field for one in raised.value.violations] == ["job.training_dataset"]


async def test_what_a_job_cannot_be_made_of_cannot_be_estimated(world: World) -> None:
    with pytest.raises(NotFound):
        await world.estimates.estimate(replace(REQUEST, model="gpt-9"), None, USER)
    async with world.store.read() as session:
        assert await session.count_jobs("acme", [*JobState]) == 0


def test_prices_are_set_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_JOBS_DB__URL", "sqlite+aiosqlite://")
    monkeypatch.setenv("LATHE_JOBS_PRICES__CURRENCY", "EUR")
    monkeypatch.setenv("LATHE_JOBS_PRICES__ENGINE_HOUR", '{"default": 2.5}')
    prices = JobsSettings.load().prices
    assert (prices.engine_hour, prices.hosting_hour) == ({"default": 2.5}, None)


@pytest.mark.parametrize(
    ("currency", "engine_hour", "words"),
    [
        ("", '{"default": 1}', "need a currency"),
        ("euro", "{}", "prices.currency"),
        ("EUR", '{"gpu": 1}', "'gpu' is none of engine_classes: default"),
        ("EUR", '{"default": -1}', "prices.engine_hour"),
    ],
)
def test_wrong_prices_are_refused(
    currency: str, engine_hour: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATHE_JOBS_DB__URL", "sqlite+aiosqlite://")
    monkeypatch.setenv("LATHE_JOBS_PRICES__CURRENCY", currency)
    monkeypatch.setenv("LATHE_JOBS_PRICES__ENGINE_HOUR", engine_hour)
    with pytest.raises(InvalidArgument, match=words):
        JobsSettings.load()
