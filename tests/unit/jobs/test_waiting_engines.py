"""An engine that waits for a node or an image: its job says so and waits, however long it takes."""

from lathe.jobs.model import EngineState, JobState
from tests.fakes.jobs import World

NO_NODE = "0 of 3 nodes have nvidia.com/gpu free"


async def waiting(world: World, sentence: str = NO_NODE) -> tuple[str, str]:
    """A job whose engine waits: their ids."""
    job = await world.queued()
    await world.reconciler.run_once()
    [engine_id] = world.launcher.processes
    world.launcher.wait_for(engine_id, sentence)
    await world.pass_time(1)
    return job.id, engine_id


async def test_the_job_says_what_its_engine_waits_for(world: World) -> None:
    job_id, engine_id = await waiting(world)
    job = await world.job(job_id)
    assert job.state_reason == f"The engine for tiny cannot start yet: {NO_NODE}"
    await world.pass_time(100)
    assert (await world.job(job_id)).version == job.version
    world.launcher.wait_for(engine_id, "the image cannot be pulled: not found")
    await world.pass_time(1)
    assert "not found" in (await world.job(job_id)).state_reason


async def test_no_wait_for_a_node_fails_a_job(world: World) -> None:
    job_id, engine_id = await waiting(world)
    await world.pass_time(4000, step=10)
    assert list(world.launcher.processes) == [engine_id]
    assert (await world.job(job_id)).state is JobState.QUEUED
    world.launcher.wait_for(engine_id, "")
    await world.pass_time(250, step=5)
    assert list(world.launcher.processes) == [engine_id]
    assert "is starting" in (await world.job(job_id)).state_reason
    await world.register(engine_id)
    assert await world.workers.lease(engine_id) is not None


async def test_the_time_to_start_counts_from_the_end_of_the_wait(world: World) -> None:
    _, engine_id = await waiting(world)
    await world.pass_time(1000, step=10)
    world.launcher.wait_for(engine_id, "")
    await world.pass_time(330, step=5)
    assert engine_id not in world.launcher.processes
    async with world.store.read() as session:
        [pool] = await session.pools()
    assert (pool.start_failures, pool.last_error) == (1, "it did not register in time")


async def test_an_engine_that_nobody_waits_for_any_more_does_not_wait_either(world: World) -> None:
    job_id, _ = await waiting(world)
    await world.service.cancel("acme", job_id)
    await world.pass_time(20)
    assert not world.launcher.processes
    async with world.store.read() as session:
        assert not await session.engines()


async def test_the_wait_is_over_with_the_registration(world: World) -> None:
    _, engine_id = await waiting(world)
    await world.register(engine_id)
    await world.pass_time(1)
    async with world.store.read() as session:
        [engine] = await session.engines()
    assert (engine.state, engine.waiting_for) == (EngineState.READY, "")
