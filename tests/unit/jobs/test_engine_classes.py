"""Jobs on engines of a class, and on engines of their own."""

from collections.abc import AsyncIterator

import pytest

from lathe.common.errors import InvalidArgument
from lathe.jobs import protos
from lathe.jobs.model import (
    ComputeSpec,
    DatasetRef,
    EngineClasses,
    EngineState,
    Job,
    JobState,
    Outcome,
)
from lathe.jobs.policy import Limits
from lathe.jobs.settings import JobsSettings
from lathe.jobs.workers import Beat
from lathe.v1 import jobs_pb2, worker_pb2
from tests.fakes.jobs import BASE, World, a_world

CLASSES = EngineClasses(("cpu", "gpu"), "cpu")
GPU = ComputeSpec("gpu")
OWN = ComputeSpec("", dedicated=True)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with a_world(classes=CLASSES) as world:
        yield world


def launched(world: World) -> dict[str, tuple[str, str]]:
    """Engine id -> class and job, of every start."""
    return {name: (one.engine_class, one.job_id) for name, one in world.launcher.launches.items()}


async def own_engine(world: World) -> tuple[str, str]:
    """A job with a registered engine of its own: their ids."""
    job = await world.queued(compute=OWN)
    await world.reconciler.run_once()
    [(engine_id, (_, job_id))] = launched(world).items()
    assert job_id == job.id
    await world.register(engine_id)
    return job.id, engine_id


async def test_a_class_that_there_is_not_is_refused_by_name(world: World) -> None:
    with pytest.raises(InvalidArgument, match="'tpu'; choose from cpu, gpu") as caught:
        await world.create(compute=ComputeSpec("tpu"))
    assert [violation.field for violation in caught.value.violations] == ["job.compute.engine_class"]


async def test_a_job_shows_the_class_that_it_got(world: World) -> None:
    assert (await world.queued()).compute == ComputeSpec("cpu")
    assert (await world.queued(compute=GPU)).compute == GPU


async def test_each_class_of_a_base_has_engines_of_its_own(world: World) -> None:
    await world.queued()
    gpu = await world.queued(compute=GPU)
    await world.pass_time(2)
    engines = {engine_class: name for name, (engine_class, _) in launched(world).items()}
    assert sorted(engines) == ["cpu", "gpu"] and len(world.launcher.launches) == 2
    for engine_id in engines.values():
        await world.register(engine_id)
    lease = await world.workers.lease(engines["gpu"])
    assert lease is not None and lease.job.id == gpu.id
    assert await world.workers.lease(engines["gpu"]) is None


async def test_a_class_that_was_taken_away_is_the_defaults() -> None:
    async with a_world() as before:
        job = await before.queued()
        after = World(before.store, before.clock, before.ids, launcher=before.launcher, classes=CLASSES)
        await after.reconciler.run_once()
        [(engine_id, (engine_class, _))] = launched(after).items()
        assert engine_class == "cpu"
        await after.register(engine_id)
        lease = await after.workers.lease(engine_id)
        assert lease is not None and lease.job.id == job.id


async def test_a_dedicated_engine_and_its_job_have_nobody_else(world: World) -> None:
    job_id, engine_id = await own_engine(world)
    other = await world.queued()
    await world.register("eng-shared")
    shared = await world.workers.lease("eng-shared")
    assert shared is not None and shared.job.id == other.id
    await world.queued()
    await world.complete(shared, Outcome.FAILED)
    again = await world.workers.lease("eng-shared")
    assert again is not None and again.job.id not in (job_id, other.id)
    own = await world.workers.lease(engine_id)
    assert own is not None and own.job.id == job_id
    assert [engine.id for engine in await world.directory.serving()] == ["eng-shared"]


async def test_a_dedicated_engine_ends_with_its_job(world: World) -> None:
    job_id, engine_id = await own_engine(world)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    await world.reconciler.run_once()
    assert not (await world.workers.heartbeat(Beat(engine_id))).shut_down
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    assert (await world.job(job_id)).state is JobState.SUCCEEDED
    await world.reconciler.run_once()
    assert (await world.workers.heartbeat(Beat(engine_id))).shut_down


async def test_a_dedicated_engine_goes_on_after_an_error_that_is_tried_again(world: World) -> None:
    job_id, engine_id = await own_engine(world)
    lease = await world.workers.lease(engine_id)
    assert lease is not None
    await world.complete(lease, Outcome.RETRYABLE)
    await world.pass_time(1)
    assert not (await world.workers.heartbeat(Beat(engine_id))).shut_down
    world.clock.tick(60)
    again = await world.workers.lease(engine_id)
    assert again is not None and again.job.id == job_id


async def test_a_cancelled_job_takes_its_launching_engine_with_it(world: World) -> None:
    job = await world.queued(compute=OWN)
    await world.reconciler.run_once()
    await world.service.cancel("acme", job.id)
    await world.pass_time(16)
    assert not world.launcher.processes
    async with world.store.read() as session:
        assert not await session.engines()
        assert all(not pool.start_failures for pool in await session.pools())


async def test_dedicated_engines_count_against_all_engines_only() -> None:
    async with a_world(limits=Limits(max_engines=3, max_engines_per_base=1), classes=CLASSES) as world:
        await world.queued()
        jobs = [await world.queued(compute=OWN) for _ in range(3)]
        await world.pass_time(5)
        assert len(world.launcher.processes) == 3
        reasons = [(await world.job(job.id)).state_reason for job in jobs]
        assert reasons[-1] == "Waits for another engine to end; 3 may run."


async def test_sampling_wants_the_default_class_unless_another_answers(world: World) -> None:
    assert not await world.directory.ensure("tiny")
    await world.reconciler.run_once()
    assert [engine_class for engine_class, _ in launched(world).values()] == ["cpu"]
    async with a_world(classes=CLASSES) as other:
        await other.queued(compute=GPU)
        await other.reconciler.run_once()
        [engine_id] = other.launcher.processes
        await other.register(engine_id)
        assert await other.directory.ensure("tiny")
        await other.pass_time(2)
        assert list(other.launcher.processes) == [engine_id]


async def test_a_dedicated_job_needs_an_engine_of_its_own_even_beside_a_free_one(world: World) -> None:
    await world.register("eng-shared")
    job = await world.queued(compute=OWN)
    assert await world.workers.lease("eng-shared") is None
    await world.pass_time(2)
    assert [job_id for _, job_id in launched(world).values()] == [job.id]
    async with world.store.read() as session:
        states = {engine.job_id: engine.state for engine in await session.engines()}
    assert states == {"": EngineState.READY, job.id: EngineState.LAUNCHING}


def test_compute_comes_and_goes_over_the_wire(world: World) -> None:
    sent = jobs_pb2.CreateJobRequest(
        parent="projects/acme",
        job=jobs_pb2.Job(compute=jobs_pb2.ComputeSpec(engine_class="gpu", dedicated=True)),
    )
    assert protos.job_request(sent).compute == ComputeSpec("gpu", True)
    job = Job("j", "acme", "tiny", BASE, DatasetRef("f"), 1, world.clock.now(), compute=GPU)
    assert protos.job_pb(job).compute == jobs_pb2.ComputeSpec(engine_class="gpu", workers=1)


async def test_an_engine_that_jobs_does_not_know_says_what_it_is_for(world: World) -> None:
    gpu, own = await world.queued(compute=GPU), await world.queued(compute=OWN)
    for engine_id, engine_class, job_id in (("eng-gpu", "gpu", ""), ("eng-own", "cpu", own.id)):
        message = worker_pb2.RegisterRequest(
            engine_id=engine_id,
            base_model=BASE.name,
            base_digest=BASE.digest,
            address="a:1",
            capacity=worker_pb2.Capacity(max_attempts=1),
            engine_class=engine_class,
            job_id=job_id,
        )
        await world.workers.register(protos.registration(message))
    taken = [await world.workers.lease(engine_id) for engine_id in ("eng-own", "eng-gpu")]
    assert [lease.job.id for lease in taken if lease is not None] == [own.id, gpu.id]


@pytest.mark.parametrize("given", ["cpu, gpu", '["cpu", "gpu"]'])
def test_classes_are_listed_with_commas_or_as_json(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATHE_JOBS_DB__URL", "sqlite+aiosqlite://")
    monkeypatch.setenv("LATHE_JOBS_ENGINE_CLASSES", given)
    assert JobsSettings.load().classes == EngineClasses(("cpu", "gpu"), "cpu")
    monkeypatch.setenv("LATHE_JOBS_DEFAULT_ENGINE_CLASS", "gpu")
    assert JobsSettings.load().classes.default == "gpu"


@pytest.mark.parametrize(
    ("classes", "default", "words"),
    [("cpu", "gpu", "none of engine_classes: cpu"), ("CPU", "", "lower-case"), ("[", "", "engine_classes")],
)
def test_wrong_classes_are_refused(
    classes: str, default: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATHE_JOBS_DB__URL", "sqlite+aiosqlite://")
    monkeypatch.setenv("LATHE_JOBS_ENGINE_CLASSES", classes)
    monkeypatch.setenv("LATHE_JOBS_DEFAULT_ENGINE_CLASS", default)
    with pytest.raises(InvalidArgument, match=words):
        JobsSettings.load()
