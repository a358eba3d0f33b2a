"""Whatever engines, users, time and outages do in whatever order: one valid token per job, no success lost."""

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lathe.common.errors import Aborted, FailedPrecondition
from lathe.jobs.model import LEASED_STATES, TERMINAL_STATES, JobState, Outcome
from lathe.jobs.workers import Beat, Lease
from tests.fakes.jobs import World, a_world

ENGINES = ("eng-a", "eng-b")
Action = tuple[str, int]
ACTIONS = st.tuples(
    st.sampled_from(
        [
            *("lease", "lease", "report", "beat", "complete", "fail", "retry", "release"),
            *("cancel", "restart", "wait", "long", "register"),
            *("both", "kill", "sleep"),
        ]
    ),
    st.integers(0, 7),
)


class Run:
    """A world with two jobs and two engines; every lease that was ever given out is remembered."""

    def __init__(self, world: World) -> None:
        self.world = world
        # Another replica of jobs, with a picture of its own of what it can trust.
        self.other = world.replica()
        self.leases: list[Lease] = []
        self.succeeded: set[str] = set()
        self.jobs: list[str] = []

    async def start(self) -> None:
        self.jobs = [(await self.world.queued()).id for _ in range(2)]
        for engine in ENGINES:
            await self.world.register(engine)

    async def act(self, name: str, number: int) -> None:
        world, engine = self.world, ENGINES[number % 2]
        lease = self.leases[number % len(self.leases)] if self.leases else None
        match name:
            case "lease":
                try:
                    taken = await world.workers.lease(engine)
                except FailedPrecondition:
                    return
                self.leases += [taken] if taken is not None else []
            case "register":
                await world.register(engine)
            case "cancel":
                try:
                    await world.service.cancel("acme", self.jobs[number % 2])
                except FailedPrecondition:
                    return
            case "restart":
                world.start()
            case "wait" | "both" | "sleep" | "long":
                await self.of_time(name, number)
            case "kill":
                names = sorted(world.launcher.processes)
                if names:
                    world.launcher.die(names[number % len(names)], killed=True)
            case _ if lease is not None:
                await self.of_engine(name, lease, number)

    async def of_time(self, name: str, number: int) -> None:
        world = self.world
        if name == "long":
            await world.pass_time(35, step=7)
        elif name == "wait":
            world.clock.tick(number)
            await world.reconciler.run_once()
            await world.steps.run_once()
        else:
            for _ in range(5 if name == "sleep" else 1):
                world.clock.tick(4)
                await asyncio.gather(world.reconciler.run_once(), self.other.reconciler.run_once())

    async def of_engine(self, name: str, lease: Lease, number: int) -> None:
        outcomes = {
            "complete": Outcome.SUCCEEDED,
            "fail": Outcome.FAILED,
            "retry": Outcome.RETRYABLE,
            "release": Outcome.RELEASED,
        }
        try:
            if name == "report":
                await self.world.report(lease, number + 1)
            elif name == "beat":
                held = [(lease.attempt.id, lease.attempt.lease_token)]
                await self.world.workers.heartbeat(Beat(lease.attempt.engine_id, held))
            else:
                before = await self.world.job(lease.job.id)
                await self.world.complete(lease, outcomes[name])
                if name == "complete" and before.state is not JobState.CANCELLING:
                    after = await self.world.job(lease.job.id)
                    if after.final_attempt_id == lease.attempt.id:
                        self.succeeded.add(lease.job.id)
        except Aborted:
            return

    async def check(self) -> None:
        async with self.world.store.read() as session:
            open_attempts = await session.open_attempts()
            engines, lost = await session.engines(), await session.lost_engines()
        assert not {engine.id for engine in engines} & set(lost)
        launched = [engine for engine in engines if engine.launched]
        assert len(launched) <= self.world.limits.max_engines_per_base
        for job_id in self.jobs:
            job = await self.world.job(job_id)
            held = [attempt for attempt in open_attempts if attempt.job_id == job_id]
            assert len(held) <= 1
            assert (job.lease_token != "") == bool(held)
            if held:
                assert job.state in LEASED_STATES
                assert (held[0].id, held[0].lease_token) == (job.attempt_id, job.lease_token)
            elif job.state in LEASED_STATES:
                assert job.final_attempt_id
            assert (job.finish_time is not None) == (job.state in TERMINAL_STATES)
            if job_id in self.succeeded:
                assert job.state in (JobState.RUNNING, JobState.SUCCEEDED)
                assert job.final_attempt_id

    async def finish(self) -> None:
        """Left alone with a working engine, every job ends, and every success is kept."""
        world = self.world
        for _ in range(4):
            world.clock.tick(50)
            await world.pass_time(28, step=7)
            await world.register("eng-z")
            lease = await world.workers.lease("eng-z")
            if lease is not None:
                await world.complete(lease, Outcome.SUCCEEDED)
            await world.steps.run_once()
        for job_id in self.jobs:
            state = (await world.job(job_id)).state
            assert state in TERMINAL_STATES
            if job_id in self.succeeded:
                assert state is JobState.SUCCEEDED


@given(st.lists(ACTIONS, max_size=25))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_order_of_events(actions: list[Action]) -> None:
    async def play() -> None:
        async with a_world() as world:
            run = Run(world)
            await run.start()
            for name, number in actions:
                await run.act(name, number)
                await run.check()
            await run.finish()

    asyncio.run(play())
