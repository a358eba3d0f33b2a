"""The lease shell against fake jobs, a fake engine and a memory store; the model's turns are taken by hand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lathe.common.errors import Internal, InvalidArgument, LatheError, Unavailable
from lathe.engine.attempts import AttemptRunner
from lathe.engine.batch import TrainRow
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import (
    Action,
    AdapterRef,
    Attempt,
    EngineReceipt,
    Environment,
    Note,
    Outcome,
    Registration,
    SlicePlan,
    TokenRef,
    TrainingConfig,
)
from lathe.engine.preparing import AttemptSettings
from lathe.engine.worker import Left, Worker, WorkerSettings
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine
from tests.fakes.objectstore import MemoryObjectStore
from tests.fakes.worker_jobs import FakeJob, FakeJobs
from tests.fixtures.threads import Threads

OBJECT = b"tokens"
PLAN = SlicePlan(16, 2, "float32", "cpu")
ENVIRONMENT = Environment({"lathe": "0"}, {"num_threads": "2"})
TOTAL = 6
TURNS = 40


def attempt(number: int = 1, **changes: object) -> Attempt:
    made = Attempt(
        attempt_id=f"att-{number}",
        lease_token=f"token-{number}",
        job="projects/p/jobs/ftjob-1",
        output_prefix=f"jobs/ftjob-1/att-{number}/",
        training=TokenRef("blobs/tokens", hashlib.sha256(OBJECT).hexdigest()),
        config=TrainingConfig(
            n_epochs=2, batch_size=4, learning_rate=1e-3, seed=3, lora_r=4, target_modules=("q_proj",)
        ),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def read_rows(path: Path) -> list[TrainRow]:
    assert path.read_bytes() == OBJECT
    return [TrainRow([row] * 8, [True] * 8) for row in range(10)]


class Bench:
    """An engine process with everything around it faked; another one can be started on the same store. Inside a running
    event loop."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.folder, self.threads = FakeClock(), folder, Threads()
        self.store, self.jobs = MemoryObjectStore(self.clock), FakeJobs(self.clock)
        self.parent_dead = False
        self._tasks: list[asyncio.Task[Left]] = []

    def start(self, max_attempts: int = 1, report_rows: int = 200, notes: tuple[Note, ...] = ()) -> None:
        self.engine = FakeEngine()
        self.loop = ModelLoop(self.engine, self.clock, LoopLimits())  # type: ignore[arg-type]
        registration = Registration(
            "eng-1", "baseModels/b", "d", "127.0.0.1:1", max_attempts, 32, "cpu", 2, "0"
        )
        self.worker = Worker(
            registration=registration,
            engine=self.engine,  # type: ignore[arg-type]
            loop=self.loop,
            jobs=self.jobs,
            store=self.store,
            clock=self.clock,
            attempts=AttemptSettings(
                self.folder / "work",
                self.folder / "cache",
                PLAN,
                read_rows,
                environment=ENVIRONMENT,
                report_rows=report_rows,
                notes=notes,
            ),
            settings=WorkerSettings(600.0, lambda: self.parent_dead),
        )
        self.task = asyncio.create_task(self.worker.run())
        self._tasks.append(self.task)

    async def kill(self) -> None:
        """As SIGKILL does: nothing more is said or stored."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def io(self, seconds: float = 0.25) -> None:
        """Let the event loop work while the clock moves a little; files are hashed in real threads."""
        for _ in range(3):
            await self.clock.advance(seconds / 3)
            await self.threads.rest()

    async def turns(self, n: int, seconds: float = 0.25) -> None:
        for _ in range(n):
            self.loop.run_once()
            await self.io(seconds)

    async def until(self, condition: Callable[[], bool], seconds: float = 0.25) -> None:
        for _ in range(TURNS * 20):
            if condition():
                return
            await self.turns(1, seconds)
        raise AssertionError("it never came")

    def weights(self) -> bytes:
        final = self.jobs.job.final
        assert final is not None
        return self.store._objects[f"{final.prefix}/adapter_model.safetensors"].content


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.store.put("blobs/tokens", OBJECT)
    yield made
    await made.kill()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final weights of a run that nothing disturbed."""

    async def run() -> bytes:
        made = Bench(tmp_path_factory.mktemp("expected"))
        await made.store.put("blobs/tokens", OBJECT)
        made.jobs.offer(attempt())
        made.start()
        await made.until(lambda: bool(made.jobs.job.outcomes))
        weights = made.weights()
        await made.kill()
        return weights

    return asyncio.run(run())


def _stored(bench: Bench, step: int) -> bool:
    return any(f"step-{step:08d}/manifest.json" in key for key in sorted(bench.store.keys()))


async def test_a_job_from_lease_to_success(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    job = bench.jobs.job
    assert job.outcomes == [Outcome.SUCCEEDED]
    assert sorted(job.metrics) == [1, 2, 3, 4, 5, 6]
    assert sorted(job.checkpoints) == [3, 6]
    assert (job.plan, job.total_steps) == (PLAN, TOTAL)
    assert job.final is not None
    assert job.final.prefix == "jobs/ftjob-1/att-1/final"
    manifest = await bench.store.get(f"{job.final.prefix}/manifest.json")
    assert hashlib.sha256(manifest).hexdigest() == job.final.manifest_sha256
    assert bench.engine.adapter_keys() == ()
    await bench.io()
    assert not list((bench.folder / "work").iterdir())
    assert bench.worker.attempts == ()


async def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_the_start(
    bench: Bench, expected: bytes
) -> None:
    bench.jobs.offer(attempt(1))
    bench.start()
    await bench.until(lambda: _stored(bench, 3))
    await bench.kill()
    (torn,) = [
        key for key in sorted(bench.store.keys()) if key.endswith("step-00000003/optimizer.safetensors")
    ]
    await bench.store.put(torn, b"torn")
    bench.jobs.offer(attempt(2))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.weights() == expected
    (note,) = [note for note in bench.jobs.job.notes if note.kind == "checkpoint_damaged"]
    assert note.step == 3 and torn in note.message


async def test_a_receipt_says_what_the_weights_were_computed_with(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    digest = hashlib.sha256(bench.weights()).hexdigest()
    assert bench.jobs.job.receipt == EngineReceipt(ENVIRONMENT, weights_sha256=digest)


async def test_a_receipt_says_that_passes_were_shared(bench: Bench) -> None:
    bench.jobs.offer(attempt(1))
    bench.jobs.offer(attempt(2))
    bench.start(max_attempts=2)
    await bench.until(lambda: len(bench.jobs.job.outcomes) == 2)
    assert bench.jobs.job.receipt is not None and bench.jobs.job.receipt.fused


async def test_a_rerun_is_compared_with_what_there_was(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    first = bench.jobs.job.final
    assert first is not None
    for number, compared, reason in (
        (2, replace(first, prefix="jobs/deleted"), "no adapter at jobs/deleted"),
        # The fake's weights are no tensors.
        (3, first, "cannot be read for a comparison"),
    ):
        bench.jobs.job = FakeJob()
        bench.jobs.offer(attempt(number, compare_with=compared))
        await bench.until(lambda: bool(bench.jobs.job.outcomes))
        assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]
        assert bench.jobs.job.receipt is not None and bench.jobs.job.receipt.comparison is not None
        assert reason in bench.jobs.job.receipt.comparison.not_compared_reason


@pytest.mark.parametrize("turns", [1, 2, 4, 6, 8, 9, 12, 14])
async def test_killed_at_any_turn_the_next_engine_ends_with_the_same_bytes(
    bench: Bench, expected: bytes, turns: int
) -> None:
    bench.jobs.offer(attempt(1))
    bench.start()
    await bench.turns(turns)
    await bench.kill()
    assert not bench.jobs.job.outcomes
    saved = max((step for step in (3, 6) if _stored(bench, step)), default=0)
    bench.jobs.offer(attempt(2))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]
    assert sorted(bench.jobs.job.metrics) == [1, 2, 3, 4, 5, 6]
    assert sorted(bench.jobs.job.checkpoints) == [3, 6]
    assert bench.weights() == expected
    assert bench.engine.calls.count("optim train/att-2") == TOTAL - saved


def _folders(bench: Bench) -> list[str]:
    """Of checkpoints in the store, of whichever attempt, half-deleted ones too."""
    keys = [key for key in sorted(bench.store.keys()) if "/checkpoints/" in key]
    return sorted({key.split("/")[4] for key in keys})


EPOCHS = replace(attempt().config, n_epochs=5, keep_checkpoints=2)


async def test_superseded_checkpoints_leave_the_store(bench: Bench) -> None:
    bench.jobs.offer(attempt(config=EPOCHS))
    bench.start()
    await bench.until(lambda: 12 in bench.jobs.job.checkpoints)
    await bench.until(lambda: "step-00000003" not in _folders(bench))
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    await bench.until(lambda: not bench.worker.attempts)
    assert sorted(bench.jobs.job.checkpoints) == [12, 15]
    assert _folders(bench) == ["step-00000012", "step-00000015"]


@pytest.mark.parametrize("turns", [6, 9, 12, 14, 17, 20])
async def test_killed_while_some_are_removed_the_next_engine_goes_on_and_removes_them(
    bench: Bench, turns: int
) -> None:
    bench.jobs.offer(attempt(1, config=EPOCHS))
    bench.start()
    await bench.turns(turns)
    await bench.kill()
    assert not bench.jobs.job.outcomes
    # Whoever goes on has something to go on from.
    steps = max(bench.jobs.job.metrics) - max(bench.jobs.job.metrics) % 3
    assert not steps or _stored(bench, steps) or _stored(bench, steps - 3)
    bench.jobs.offer(attempt(2, config=EPOCHS))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    await bench.until(lambda: not bench.worker.attempts)
    assert sorted(bench.jobs.job.checkpoints) == [12, 15]
    assert _folders(bench) == ["step-00000012", "step-00000015"]


@pytest.mark.parametrize("error", [Unavailable("refused", reason="STORE_REFUSED"), Internal("not allowed")])
async def test_a_store_that_deletes_nothing_does_not_hold_up_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: LatheError
) -> None:
    refused: list[str] = []

    async def refuse(key: str) -> None:
        refused.append(key)
        raise error

    monkeypatch.setattr(bench.store, "delete", refuse)
    monkeypatch.setattr(bench.store, "delete_prefix", refuse)
    bench.jobs.offer(attempt(config=EPOCHS))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    await bench.until(lambda: not bench.worker.attempts)
    assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]
    assert sorted(bench.jobs.job.checkpoints) == [12, 15]
    assert refused


async def test_a_checkpoint_stays_until_jobs_knows_that_it_is_given_up(bench: Bench) -> None:
    bench.jobs.offer(attempt(config=EPOCHS))
    bench.start()
    await bench.until(lambda: 6 in bench.jobs.job.checkpoints)
    bench.jobs.outage = Unavailable("away")
    await bench.until(lambda: _stored(bench, 15))
    assert _folders(bench) == [f"step-{step:08d}" for step in (3, 6, 9, 12, 15)]
    bench.jobs.outage = None
    await bench.until(lambda: bool(bench.jobs.job.outcomes), seconds=5.0)
    await bench.until(lambda: not bench.worker.attempts)
    assert _folders(bench) == ["step-00000012", "step-00000015"]


async def test_what_was_stored_but_never_reported_is_reported_by_the_next_attempt(
    bench: Bench, expected: bytes
) -> None:
    bench.jobs.offer(attempt(1))
    bench.start()
    await bench.turns(3)
    bench.jobs.outage = Unavailable("jobs is away")
    await bench.until(lambda: any("step-00000003/manifest" in key for key in sorted(bench.store.keys())))
    await bench.kill()
    bench.jobs.outage = None
    assert 3 not in bench.jobs.job.metrics
    bench.jobs.offer(attempt(2))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert sorted(bench.jobs.job.metrics) == [1, 2, 3, 4, 5, 6]
    assert bench.jobs.job.checkpoints[3].ref.prefix.startswith("jobs/ftjob-1/att-1/")
    assert bench.weights() == expected


async def test_a_checkpoint_is_not_told_before_the_steps_that_lead_to_it(bench: Bench) -> None:
    """After an outage there is more to tell than fits into one report."""
    bench.jobs.offer(attempt())
    bench.start(report_rows=1)
    await bench.until(lambda: 1 in bench.jobs.job.metrics)
    bench.jobs.outage = Unavailable("away")
    await bench.until(lambda: _stored(bench, TOTAL))
    bench.jobs.outage = None
    await bench.until(lambda: bool(bench.jobs.job.outcomes), seconds=5.0)
    assert bench.jobs.job.told == [1, 2, 3, "checkpoint 3", 4, 5, 6, "checkpoint 6"]


async def test_cancel(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    # Half deleted.
    await bench.store.put(
        f"{attempt().output_prefix.rstrip('/')}/checkpoints/step-00000002/optimizer.safetensors", b""
    )
    bench.start()
    await bench.turns(5)
    bench.jobs.directives = {"att-1": Action.CANCEL}
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.CANCELLED]
    await bench.turns(2)
    assert _folders(bench) == [f"step-{step:08d}" for step in sorted(bench.jobs.job.checkpoints)]
    assert not any("/final/" in key for key in sorted(bench.store.keys()))
    assert bench.engine.adapter_keys() == ()


@pytest.mark.parametrize("action", [Action.PAUSE, Action.PREEMPT])
async def test_pause_and_preempt_give_the_attempt_back_after_a_checkpoint(
    bench: Bench, expected: bytes, action: Action
) -> None:
    bench.jobs.offer(attempt(1))
    bench.start()
    await bench.turns(6)
    bench.jobs.directives = {"att-1": action}
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.RELEASED]
    assert any("checkpoints" in key and "manifest" in key for key in sorted(bench.store.keys()))
    bench.jobs.directives = {}
    bench.jobs.offer(attempt(2))
    await bench.until(lambda: len(bench.jobs.job.outcomes) == 2)
    assert bench.weights() == expected


async def test_a_lease_that_cannot_be_renewed_stops_training_and_goes_on_if_it_is_still_ours(
    bench: Bench,
) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.turns(6, seconds=0.1)
    bench.jobs.outage = Unavailable("jobs is away")
    await bench.turns(2, seconds=20.0)
    before = list(bench.engine.calls)
    await bench.turns(3)
    assert bench.engine.calls == before
    bench.jobs.outage = None
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]


async def test_a_lost_lease_is_dropped_without_a_word(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.turns(6)
    bench.jobs.revoke("att-1")
    await bench.until(lambda: not bench.worker.attempts)
    await bench.turns(1)
    assert not bench.jobs.job.outcomes
    assert bench.engine.adapter_keys() == ()


async def test_an_outage_of_the_store_makes_the_attempt_wait(bench: Bench) -> None:
    bench.store.outage = Unavailable("the store is away")
    bench.jobs.offer(attempt())
    bench.start()
    await bench.turns(4)
    assert bench.worker.attempts == ("att-1",)
    bench.store.outage = None
    await bench.until(lambda: len(bench.jobs.job.metrics) >= 2, seconds=1.0)
    bench.store.outage = Unavailable("the store is away again")
    await bench.turns(20)
    assert not bench.jobs.job.outcomes
    bench.store.outage = None
    await bench.until(lambda: bool(bench.jobs.job.outcomes), seconds=1.0)
    assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]


async def test_a_configuration_that_cannot_train_fails_the_job_and_lost_tokens_are_tried_again(
    bench: Bench,
) -> None:
    config = replace(attempt().config, target_modules=("nonsense",))
    bench.jobs.offer(attempt(1, config=config))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.FAILED]
    assert bench.jobs.job.error is not None
    bench.jobs.offer(attempt(2, training=TokenRef("blobs/tokens", "0" * 64)))
    await bench.until(lambda: len(bench.jobs.job.outcomes) == 2)
    assert bench.jobs.job.outcomes[1] is Outcome.RETRYABLE


async def test_tokens_that_are_gone_fail_the_job_at_once(bench: Bench) -> None:
    bench.jobs.offer(attempt(training=TokenRef("blobs/gone", "0" * 64)))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.FAILED]
    assert bench.jobs.job.error is not None and bench.jobs.job.error.code == "tokens_gone"
    assert "blobs/gone" in bench.jobs.job.error.message


async def test_a_deleted_parent_fails_the_job_at_once(bench: Bench) -> None:
    bench.jobs.offer(attempt(initial_adapter=AdapterRef("jobs/p/a/final", "c" * 64)))
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.FAILED]
    assert bench.jobs.job.error is not None and bench.jobs.job.error.code == "parent_deleted"


async def test_it_leases_no_more_than_it_can_train(bench: Bench) -> None:
    for number in (1, 2, 3):
        bench.jobs.offer(attempt(number))
    bench.start(max_attempts=2)
    await bench.io(2.0)
    assert bench.worker.attempts == ("att-1", "att-2")


async def test_drain_checkpoints_releases_and_deregisters(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.turns(6)
    draining = asyncio.create_task(bench.worker.drain(30.0))
    await bench.until(draining.done)
    assert bench.jobs.job.outcomes == [Outcome.RELEASED]
    assert bench.jobs.deregistered == ["eng-1"]


async def test_an_orphan_stores_its_checkpoint_and_leaves(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.start()
    await bench.turns(6)
    bench.jobs.outage = Unavailable("jobs is gone for good")
    await bench.io(300.0)
    assert not bench.task.done()
    await bench.io(400.0)
    left = await bench.task
    assert "out of reach for 600 seconds" in left.reason
    assert not left.jobs_listens
    draining = asyncio.create_task(bench.worker.drain(10.0, report=False))
    await bench.until(draining.done)
    assert any("checkpoints" in key and "manifest" in key for key in sorted(bench.store.keys()))


@pytest.mark.parametrize("why", ["parent", "jobs"])
async def test_reasons_to_leave(bench: Bench, why: str) -> None:
    bench.start()
    await bench.io()
    assert [item.engine_id for item in bench.jobs.registered] == ["eng-1"]
    if why == "parent":
        bench.parent_dead = True
    else:
        bench.jobs.shut_down = True
    await bench.io(4.0)
    left = await bench.task
    assert left.jobs_listens == (why == "jobs")


async def test_heartbeats_come_at_the_interval_with_or_without_work(bench: Bench) -> None:
    bench.start()
    await bench.io(0.3)
    for _ in range(12):
        await bench.io(1.0)
    gaps = [b - a for a, b in zip(bench.jobs.heartbeats, bench.jobs.heartbeats[1:], strict=False)]
    assert len(gaps) >= 3
    assert all(gap == pytest.approx(3.0) for gap in gaps)


async def test_a_cancel_between_the_preparation_and_the_start_is_not_lost(bench: Bench) -> None:
    bench.start(max_attempts=0)
    bench.jobs.offer(attempt())
    leased = await bench.jobs.lease("eng-1")
    assert leased is not None
    runner = AttemptRunner(
        attempt=leased,
        engine=bench.engine,  # type: ignore[arg-type]
        loop=bench.loop,
        jobs=bench.jobs,
        store=bench.store,
        clock=bench.clock,
        settings=AttemptSettings(bench.folder / "work", bench.folder / "cache", PLAN, read_rows),
    )
    start = bench.loop.start

    def told_just_before(*args: Any) -> None:
        runner.stop(Outcome.CANCELLED)
        start(*args)

    bench.loop.start = told_just_before  # type: ignore[method-assign]
    task = asyncio.create_task(runner.run())
    await bench.until(task.done)
    assert bench.jobs.job.outcomes == [Outcome.CANCELLED]


async def test_what_an_engine_tells_every_job_comes_before_its_first_step(bench: Bench) -> None:
    note = Note(0, "sharded", "The base model is sharded.")
    bench.jobs.offer(attempt())
    bench.start(notes=(note,))
    await bench.until(lambda: bool(bench.jobs.job.notes))
    assert bench.jobs.job.notes[0] == note and not bench.jobs.job.metrics
    await bench.until(lambda: bool(bench.jobs.job.outcomes))
    assert bench.jobs.job.outcomes == [Outcome.SUCCEEDED]


async def test_reports_that_are_refused_for_good_end_the_attempt(bench: Bench) -> None:
    bench.jobs.offer(attempt())
    bench.jobs.refusal = InvalidArgument("metrics.step is wrong.")
    bench.start()
    await bench.until(lambda: bool(bench.jobs.job.outcomes), seconds=1.0)
    assert bench.jobs.job.outcomes == [Outcome.RETRYABLE]
    assert bench.jobs.job.error is not None
    assert "metrics.step is wrong." in bench.jobs.job.error.message
    await bench.until(lambda: not bench.worker.attempts)
