"""What jobs that have ended left in the object store."""

import pytest

from lathe.common.errors import InvalidArgument, Unavailable
from lathe.jobs.leftovers import SWEPT_AFTER
from lathe.jobs.model import AdapterObject, JobState, Outcome
from lathe.jobs.policy import MAX_RETRIES
from lathe.jobs.progress import ReportedCheckpoint
from lathe.jobs.workers import Lease
from tests.fakes.jobs import World

LONG = SWEPT_AFTER.total_seconds()


async def with_checkpoints(world: World, *steps: int) -> Lease:
    lease = await world.leased()
    points = [
        ReportedCheckpoint(step, AdapterObject(f"{lease.attempt.prefix}checkpoints/{step}", "c" * 64))
        for step in steps
    ]
    await world.report(lease, *steps, checkpoints=points)
    return lease


async def test_what_a_success_made_and_users_are_shown_stays(world: World) -> None:
    lease = await with_checkpoints(world, 1, 2)
    await world.report(lease, dropped_checkpoints=(1,))
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    await world.leftovers.sweep()
    # An engine that lost its lease may still be writing.
    assert not world.models.swept
    world.clock.tick(LONG)
    await world.leftovers.sweep()
    kept = [f"{lease.attempt.prefix}checkpoints/2", f"{lease.attempt.prefix}final"]
    assert world.models.swept == {lease.job.id: kept}


async def test_a_job_whose_tries_are_spent_is_swept_and_one_that_goes_on_is_not(world: World) -> None:
    lease = await with_checkpoints(world, 1)
    await world.register()
    for _ in range(MAX_RETRIES):
        await world.complete(lease, Outcome.RETRYABLE)
        world.clock.tick(2 * LONG)
        await world.leftovers.sweep()
        again = await world.workers.lease("eng-a")
        assert again is not None and not world.models.swept
        lease = again
    await world.complete(lease, Outcome.RETRYABLE)
    assert (await world.job(lease.job.id)).state is JobState.FAILED
    world.clock.tick(LONG)
    await world.leftovers.sweep()
    [kept] = world.models.swept.values()
    assert [prefix.rsplit("/", 1)[1] for prefix in kept] == ["1"]


async def test_a_sweep_that_failed_is_repeated_and_one_that_was_done_is_not(world: World) -> None:
    lease = await with_checkpoints(world)
    await world.complete(lease, Outcome.FAILED)
    world.clock.tick(LONG)
    world.models.down = Unavailable("away")
    with pytest.raises(Unavailable):
        await world.leftovers.sweep()
    world.models.down = None
    # Another process, after a kill.
    world.start()
    await world.leftovers.sweep()
    assert world.models.swept == {lease.job.id: []}
    world.models.swept.clear()
    await world.leftovers.sweep()
    assert not world.models.swept


async def test_what_models_refuses_for_good_keeps_no_other_job_waiting(world: World) -> None:
    first, second = await with_checkpoints(world), await world.queued()
    await world.complete(first, Outcome.FAILED)
    world.clock.tick(LONG)
    world.models.down = InvalidArgument("no such folder")
    await world.leftovers.sweep()
    world.models.down = None
    await world.service.cancel("acme", second.id)
    world.clock.tick(LONG)
    await world.leftovers.sweep()
    assert world.models.swept == {second.id: []}


async def test_what_was_trained_to_the_end_stays_though_its_registration_was_refused(world: World) -> None:
    lease = await with_checkpoints(world)
    await world.complete(lease, Outcome.SUCCEEDED)
    world.models.down = InvalidArgument("its rank is not what was said")
    await world.steps.run_once()
    world.models.down = None
    assert (await world.job(lease.job.id)).state is JobState.FAILED
    world.clock.tick(LONG)
    await world.leftovers.sweep()
    assert world.models.swept == {lease.job.id: [f"{lease.attempt.prefix}final"]}
