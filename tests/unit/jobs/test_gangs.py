"""Jobs on several workers: who may have them, what is started for them, and what the loss of a worker means."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lathe.common.errors import InvalidArgument, Unavailable
from lathe.jobs import protos
from lathe.jobs.gangs import Gangs
from lathe.jobs.launchers.processes import gang_variables
from lathe.jobs.model import ComputeSpec, Job, JobState, Outcome
from lathe.jobs.ports import EngineLaunch
from lathe.jobs.reports import Completion
from lathe.jobs.workers import Beat, Lease
from lathe.v1 import jobs_pb2, worker_pb2
from tests.fakes.jobs import USER, World, a_world

TWO = ComputeSpec("", workers=2)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with a_world() as world:
        yield world


async def leased(world: World) -> tuple[Job, Lease]:
    """A job of two workers, on the engine that was started for it."""
    job = await world.queued(compute=TWO)
    await world.reconciler.run_once()
    [engine_id] = world.launcher.launches
    await world.register(engine_id)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    return job, lease


def lost(lease: Lease) -> Completion:
    """As the engine says it."""
    said = worker_pb2.CompleteAttemptRequest(
        attempt_id=lease.attempt.id,
        lease_token=lease.attempt.lease_token,
        outcome=worker_pb2.ATTEMPT_OUTCOME_WORKER_LOST,
        step=7,
        error=jobs_pb2.JobError(code="server_error", message="A worker of this job was lost: it is gone."),
    )
    return protos.completion(said)


# --- who may have them ---


async def test_a_job_on_several_workers_has_an_engine_of_its_own(world: World) -> None:
    job = await world.queued(compute=TWO)
    assert job.compute == ComputeSpec("default", dedicated=True, workers=2)
    await world.reconciler.run_once()
    [launch] = world.launcher.launches.values()
    assert (launch.job_id, launch.workers) == (job.id, 2)


async def test_an_engine_of_several_jobs_has_one_worker(world: World) -> None:
    await world.queued()
    await world.reconciler.run_once()
    [launch] = world.launcher.launches.values()
    assert (launch.job_id, launch.workers) == ("", 1)


async def test_what_starts_engines_may_refuse_with_its_words(world: World) -> None:
    world.launcher.one_worker = "there is no Ray."
    with pytest.raises(InvalidArgument, match="workers is 2: there is no Ray") as caught:
        await world.create(compute=TWO)
    assert [violation.field for violation in caught.value.violations] == ["job.compute.workers"]
    assert (await world.create()).compute.workers == 1


async def test_a_rerun_needs_as_many_workers(world: World) -> None:
    job, lease = await leased(world)
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    again = await world.service.rerun("acme", job.id, "", USER)
    assert again.compute == ComputeSpec("default", dedicated=True, workers=2)
    world.launcher.one_worker = "there is no Ray."
    with pytest.raises(InvalidArgument, match="there is no Ray"):
        await world.service.rerun("acme", job.id, "", USER)


async def test_an_operator_says_how_many_there_may_be(world: World) -> None:
    gangs = Gangs(4)
    gangs.launcher = world.launcher
    await gangs.check(4)
    with pytest.raises(InvalidArgument, match="workers is 5: a job may have 4 at most"):
        await gangs.check(5)


async def test_nothing_is_promised_while_nobody_knows(world: World) -> None:
    await Gangs().check(1)
    with pytest.raises(Unavailable):
        await Gangs().check(2)
    with pytest.raises(InvalidArgument, match="does not start engines itself"):
        await Gangs(starts_engines=False).check(2)


def test_an_engine_learns_of_its_workers_only_if_it_has_some() -> None:
    one = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "default")
    assert gang_variables(one, 1.0, 0.0) == {}
    four = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "default", "job-1", workers=4)
    assert gang_variables(four, 0.5, 1.0) == {
        "LATHE_ENGINE_WORKERS": "4",
        "LATHE_ENGINE_RAY_ADDRESS": "auto",
        "LATHE_ENGINE_WORKER_CPUS": "0.5",
        "LATHE_ENGINE_WORKER_GPUS": "1",
    }


# --- the loss of one ---


async def test_a_lost_worker_is_a_lost_lease_and_the_job_goes_on_elsewhere_at_once(world: World) -> None:
    job, lease = await leased(world)
    await world.reports.complete(lost(lease))
    found = await world.job(job.id)
    assert (found.state, found.lost_lease_count, found.retry_count) == (JobState.QUEUED, 1, 0)
    assert found.hold_until is None
    assert any("A worker of this job was lost" in said for said in await world.messages(job.id))
    old = lease.attempt.engine_id
    # It cannot get another worker: it has no other attempt, and hears that it shall end.
    assert await world.workers.lease(old) is None
    assert (await world.workers.heartbeat(Beat(old))).shut_down
    await world.workers.deregister(old)
    await world.reconciler.run_once()
    [new] = set(world.launcher.launches) - {old}
    assert world.launcher.launches[new].workers == 2
    await world.register(new)
    again = await world.workers.lease(new)
    assert again is not None and (again.job.id, again.attempt.number) == (job.id, 2)
    assert again.earlier_prefixes == [lease.attempt.prefix]


async def test_the_loss_of_a_worker_may_be_said_twice(world: World) -> None:
    job, lease = await leased(world)
    await world.reports.complete(lost(lease))
    await world.reports.complete(lost(lease))
    assert (await world.job(job.id)).lost_lease_count == 1


async def test_an_engine_that_did_not_lose_a_worker_stays(world: World) -> None:
    _, lease = await leased(world)
    await world.complete(lease, Outcome.RETRYABLE)
    assert not (await world.workers.heartbeat(Beat(lease.attempt.engine_id))).shut_down
