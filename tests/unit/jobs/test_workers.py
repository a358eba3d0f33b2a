"""What engines can do, and what a stale one cannot."""

from dataclasses import replace

import pytest

from lathe.common.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, Unavailable
from lathe.jobs.model import Action, AdapterObject, JobError, JobState, Outcome, SlicePlan
from lathe.jobs.ports import Quota
from lathe.jobs.progress import Note, ReportedCheckpoint
from lathe.jobs.training import TrainingSpec
from lathe.jobs.workers import Beat, Lease
from tests.fakes.jobs import OTHER, World, measured

PLAN = SlicePlan(320, 2, "bfloat16", "cpu")


def beat(lease: Lease) -> Beat:
    return Beat(lease.attempt.engine_id, [(lease.attempt.id, lease.attempt.lease_token)])


def checkpoint(lease: Lease, step: int) -> ReportedCheckpoint:
    return ReportedCheckpoint(step, AdapterObject(f"{lease.attempt.prefix}checkpoints/{step}", "c" * 64))


async def test_a_job_runs_to_its_end(world: World) -> None:
    lease = await world.leased(suffix="s")
    assert (lease.attempt.number, lease.earlier_prefixes) == (1, [])
    assert (await world.job(lease.job.id)).state is JobState.STARTING
    await world.report(lease, 1, 2, slice_plan=PLAN)
    job = await world.job(lease.job.id)
    assert (job.state, job.step, job.slice_plan, job.trained_tokens) == (JobState.RUNNING, 2, PLAN, 14)
    assert job.estimated_finish_time is not None
    assert (job.estimated_finish_time - world.clock.now()).total_seconds() == 16
    await world.report(lease, checkpoints=[checkpoint(lease, 2)])
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    job = await world.job(lease.job.id)
    assert job.state is JobState.SUCCEEDED
    assert job.fine_tuned_model == f"ft:tiny:acme:s:{job.id[-12:]}"
    assert set(world.models.adapters) == {job.fine_tuned_model, f"{job.fine_tuned_model}:ckpt-step-2"}
    assert world.models.adapters[job.fine_tuned_model].attempt == lease.attempt.id
    assert world.datasets.results[f"{job.id}-results"].count(b"\n") == 3
    assert job.result_files == (f"file-{job.id}-results", f"file-{job.id}-receipt")
    assert (await world.messages(job.id))[3:] == [
        "Fine-tuning job started",
        "Step 1/10: training loss=1.50",
        "Step 2/10: training loss=1.50",
        "Checkpoint created at step 2",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]


async def test_only_an_engine_of_the_base_with_room_gets_the_job(world: World) -> None:
    await world.queued()
    await world.queued()
    await world.register("eng-other", OTHER)
    assert await world.workers.lease("eng-other") is None
    with pytest.raises(FailedPrecondition):
        await world.workers.lease("eng-unknown")
    await world.register()
    assert await world.workers.lease("eng-a") is not None
    assert await world.workers.lease("eng-a") is None
    await world.register("eng-b")
    await world.workers.heartbeat(Beat("eng-b", draining=True))
    assert await world.workers.lease("eng-b") is None


async def test_a_job_that_trains_the_whole_model_shares_its_engine_with_nobody(world: World) -> None:
    await world.register(max_attempts=4)
    first = await world.queued()
    whole = await world.queued(spec=TrainingSpec(full_parameter=True))
    last = await world.queued()
    taken = await world.workers.lease("eng-a")
    assert taken is not None
    assert taken.job.id == first.id
    # The last would have room, but not before the one in front of it.
    assert await world.workers.lease("eng-a") is None
    await world.complete(taken, Outcome.SUCCEEDED)
    alone = await world.workers.lease("eng-a")
    assert alone is not None
    assert alone.job.id == whole.id
    assert await world.workers.lease("eng-a") is None
    await world.complete(alone, Outcome.SUCCEEDED)
    after = await world.workers.lease("eng-a")
    assert after is not None
    assert after.job.id == last.id


async def test_a_job_that_must_be_alone_is_not_passed_for_ever(world: World) -> None:
    await world.register("eng-o", OTHER)
    await world.queued(model="other")
    # acme runs one job, as the other projects do, which always have a next one.
    assert await world.workers.lease("eng-o") is not None
    await world.register(max_attempts=3)
    running = []
    for project in ("beta", "gamma"):
        await world.queued(project=project)
        running.append(await world.workers.lease("eng-a"))
    whole = await world.queued(spec=TrainingSpec(full_parameter=True))
    taken = []
    for lease in running:
        assert lease is not None
        await world.queued(project=lease.job.project)
        taken.append(await world.workers.lease("eng-a"))
        await world.complete(lease, Outcome.SUCCEEDED)
        taken.append(await world.workers.lease("eng-a"))
    alone = taken.pop()
    assert taken == [None, None, None]
    assert alone is not None and alone.job.id == whole.id
    await world.complete(alone, Outcome.SUCCEEDED)
    after = await world.workers.lease("eng-a")
    assert after is not None and (await world.job(whole.id)).turn_time is None


async def test_the_quota_of_running_jobs_is_kept(world: World) -> None:
    world.accounts.quota = Quota(max_running_jobs=1)
    await world.leased()
    await world.queued()
    await world.register("eng-b")
    assert await world.workers.lease("eng-b") is None
    world.accounts.down = Unavailable("accounts is away.")
    assert await world.workers.lease("eng-b") is None


async def test_a_lease_lives_by_heartbeats(world: World) -> None:
    lease = await world.leased()
    for _ in range(10):
        await world.pass_time(5, step=5)
        answer = await world.workers.heartbeat(beat(lease))
        assert not answer.directives and not answer.reregister and not answer.shut_down
    await world.pass_time(20, step=5)
    job = await world.job(lease.job.id)
    assert (job.state, job.lost_lease_count) == (JobState.QUEUED, 1)
    assert (await world.workers.heartbeat(beat(lease))).directives == [(lease.attempt.id, Action.LEASE_LOST)]


async def test_a_stale_token_is_refused_everywhere(world: World) -> None:
    old = await world.leased()
    await world.report(old, 1)
    await world.pass_time(40, step=5)
    await world.register("eng-b")
    new = await world.workers.lease("eng-b")
    assert new is not None and new.earlier_prefixes == [old.attempt.prefix]
    assert new.attempt.lease_token != old.attempt.lease_token
    for stale in (old, replace(new, attempt=replace(new.attempt, lease_token=old.attempt.lease_token))):
        with pytest.raises(Aborted):
            await world.report(stale, 2)
        for outcome in (Outcome.SUCCEEDED, Outcome.RETRYABLE):
            with pytest.raises(Aborted):
                await world.complete(stale, outcome)
    await world.report(new, 2)


async def test_a_repeated_step_replaces_its_numbers_and_makes_no_second_event(world: World) -> None:
    lease = await world.leased()
    await world.report(lease, 1, 2, 3)
    await world.report(lease, metrics=[measured(3, loss=0.5), measured(4)])
    async with world.store.read() as session:
        rows = await session.metrics(lease.job.id)
    assert [(row.step, row.train_loss) for row in rows] == [(1, 1.5), (2, 1.5), (3, 0.5), (4, 1.5)]
    steps = [message for message in await world.messages(lease.job.id) if message.startswith("Step")]
    assert len(steps) == 4
    assert (await world.job(lease.job.id)).trained_tokens == 28


async def test_a_later_attempt_gets_the_first_plan(world: World) -> None:
    lease = await world.leased()
    await world.report(lease, 1, slice_plan=PLAN)
    await world.complete(lease, Outcome.RELEASED)
    again = await world.workers.lease("eng-a")
    assert again is not None and again.job.slice_plan == PLAN
    await world.report(again, 2, slice_plan=replace(PLAN, threads=8))
    job = await world.job(lease.job.id)
    assert (job.slice_plan, job.lost_lease_count, job.retry_count) == (PLAN, 0, 0)
    assert (await world.messages(job.id)).count("Fine-tuning job started") == 1


async def test_a_checkpoint_is_told_once(world: World) -> None:
    lease = await world.leased()
    points = [checkpoint(lease, step) for step in (1, 2, 3, 4, 5)]
    await world.report(lease, checkpoints=points[:3])
    await world.report(lease, checkpoints=points)
    await world.report(lease, checkpoints=points)
    _, kept = await world.service.checkpoints("acme", lease.job.id, before_step=None, limit=10)
    assert [point.step for point in kept] == [5, 4, 3, 2, 1]
    created = [m for m in await world.messages(lease.job.id) if m.startswith("Checkpoint")]
    assert created == [f"Checkpoint created at step {step}" for step in range(1, 6)]


async def test_a_checkpoint_written_anew_takes_the_place_of_a_damaged_one_alone(world: World) -> None:
    first = await world.leased()
    await world.report(first, checkpoints=[checkpoint(first, step) for step in (1, 2)])
    await world.complete(first, Outcome.RELEASED)
    second = await world.workers.lease("eng-a")
    assert second is not None
    await world.report(
        second, notes=[Note(2, "checkpoint_damaged", "The checkpoint step-00000002 cannot be used.")]
    )
    again = [checkpoint(first, 2), checkpoint(second, 1), checkpoint(second, 2)]
    for point in again:
        await world.report(second, checkpoints=[point])
    await world.report(second, checkpoints=again[:1])
    _, kept = await world.service.checkpoints("acme", first.job.id, before_step=None, limit=10)
    assert [(point.step, point.object) for point in kept] == [
        (2, again[2].object),
        (1, checkpoint(first, 1).object),
    ]


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RELEASED])
async def test_cancelling_ends_with_the_attempt(world: World, outcome: Outcome) -> None:
    lease = await world.leased()
    assert (await world.service.cancel("acme", lease.job.id)).state is JobState.CANCELLING
    assert (await world.workers.heartbeat(beat(lease))).directives == [(lease.attempt.id, Action.CANCEL)]
    await world.complete(lease, outcome)
    assert (await world.job(lease.job.id)).state is JobState.CANCELLED


async def test_cancelling_ends_with_a_lost_lease(world: World) -> None:
    lease = await world.leased()
    await world.service.cancel("acme", lease.job.id)
    await world.pass_time(40, step=5)
    assert (await world.job(lease.job.id)).state is JobState.CANCELLED


async def test_an_error_of_the_job_fails_it(world: World) -> None:
    lease = await world.leased()
    await world.complete(lease, Outcome.FAILED, error=JobError("out_of_memory", "A row is too long."))
    job = await world.job(lease.job.id)
    assert (job.state, job.error) == (JobState.FAILED, JobError("out_of_memory", "A row is too long."))


async def test_retryable_errors_have_a_budget(world: World) -> None:
    lease: Lease | None = await world.leased()
    for _ in range(3):
        assert lease is not None
        await world.complete(lease, Outcome.RETRYABLE, error=JobError("server_error", "The store is odd."))
        assert await world.workers.lease("eng-a") is None
        world.clock.tick(60)
        lease = await world.workers.lease("eng-a")
    assert lease is not None
    await world.complete(lease, Outcome.RETRYABLE, error=JobError("server_error", "The store is odd."))
    job = await world.job(lease.job.id)
    assert job.state is JobState.FAILED and job.error is not None
    assert "The store is odd." in job.error.message


async def test_success_needs_an_adapter(world: World) -> None:
    lease = await world.leased()
    with pytest.raises(InvalidArgument):
        await world.complete(lease, Outcome.SUCCEEDED, final_adapter=None)


async def test_an_adapter_from_elsewhere_is_refused(world: World) -> None:
    lease = await world.leased()
    for prefix in ("jobs/ftjob-other/att-1/final", f"{lease.attempt.prefix}../../ftjob-other/att-1/final"):
        foreign = AdapterObject(prefix, "f" * 64)
        with pytest.raises(InvalidArgument):
            await world.complete(lease, Outcome.SUCCEEDED, final_adapter=foreign)
        with pytest.raises(InvalidArgument):
            await world.report(lease, 1, checkpoints=[ReportedCheckpoint(1, foreign)])
    assert (await world.job(lease.job.id)).state is JobState.STARTING


async def test_registration_waits_for_models_and_survives_a_restart(world: World) -> None:
    lease = await world.leased()
    await world.report(lease, 1)
    await world.complete(lease, Outcome.SUCCEEDED)
    world.models.down = Unavailable("models is away.")
    await world.steps.run_once()
    world.start()
    await world.pass_time(60, step=5)
    assert (await world.job(lease.job.id)).state is JobState.RUNNING
    world.models.down = None
    world.datasets.down = Unavailable("datasets is away.")
    await world.steps.run_once()
    assert (await world.job(lease.job.id)).state is JobState.RUNNING
    world.datasets.down = None
    await world.steps.run_once()
    assert (await world.job(lease.job.id)).state is JobState.SUCCEEDED


async def test_what_cannot_be_registered(world: World) -> None:
    lease = await world.leased()
    broken = checkpoint(lease, 1)
    await world.report(lease, 1, checkpoints=[broken])
    world.models.refused[broken.object.prefix] = DataLoss("The manifest is damaged.")
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    job = await world.job(lease.job.id)
    assert (job.state, len(world.models.adapters)) == (JobState.SUCCEEDED, 1)
    other = await world.leased()
    world.models.refused[f"{other.attempt.prefix}final"] = DataLoss("The manifest is damaged.")
    await world.complete(other, Outcome.SUCCEEDED)
    await world.steps.run_once()
    assert (await world.job(other.job.id)).state is JobState.FAILED


async def test_an_engine_that_leaves_gives_its_job_back(world: World) -> None:
    lease = await world.leased()
    await world.workers.deregister("eng-a")
    await world.workers.deregister("eng-a")
    assert (await world.job(lease.job.id)).state is JobState.QUEUED
    assert (await world.workers.heartbeat(beat(lease))).reregister


async def test_an_engine_of_another_version_ends_what_it_trains(world: World) -> None:
    lease = await world.leased()
    held = replace(beat(lease), config_version=0)
    assert not (await world.workers.heartbeat(held)).shut_down
    await world.complete(lease, Outcome.SUCCEEDED)
    assert (await world.workers.heartbeat(replace(held, leases=()))).shut_down


async def test_an_engine_of_another_version_gets_no_work_and_is_replaced(world: World) -> None:
    """It would train without the settings that it does not know."""
    await world.queued()
    await world.register("eng-old")
    assert await world.workers.lease("eng-old", 0) is None
    answer = await world.workers.heartbeat(Beat("eng-old", config_version=0))
    assert answer.shut_down
    assert await world.workers.lease("eng-old") is None
    await world.workers.deregister("eng-old")
    await world.reconciler.run_once()
    assert len(world.launcher.launches) == 1
    await world.register("eng-new")
    assert await world.workers.lease("eng-new") is not None
