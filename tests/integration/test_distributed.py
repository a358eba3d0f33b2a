"""One job on two workers, an engine and a Ray actor: the numbers of one; sharded too, when one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.torch import load

from lathe.engine.model import Outcome
from tests.fakes.worker_jobs import FakeJob
from tests.fixtures.engine_process import Place, engine_place
from tests.fixtures.ray import RayHead

BOUND = 1e-5
EPOCHS = 8
STEPS = EPOCHS * 10


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with engine_place(tmp_path) as made:
        yield made


def on_two(head: RayHead) -> dict[str, str]:
    """An engine's settings."""
    return {
        "LATHE_ENGINE_WORKERS": "2",
        "LATHE_ENGINE_RAY_ADDRESS": head.address,
        "LATHE_ENGINE_WORKER_CPUS": "0.5",
        "LATHE_ENGINE_RANK_TIMEOUT_S": "20",
    }


def actors() -> list[int]:
    """Processes of Ray that are a worker of ours."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::PeerProcess"):
                found.append(int(entry.name))
        except OSError:
            continue  # no process, or it ended meanwhile
    return found


async def trained(place: Place) -> tuple[list[float], bytes]:
    """The losses of a finished job's steps, and its adapter."""
    assert place.jobs.job.outcomes == [Outcome.SUCCEEDED], place.logs()
    metrics = place.jobs.job.metrics
    assert sorted(metrics) == list(range(1, STEPS + 1))
    return [metrics[step].train_loss for step in sorted(metrics)], await place.weights()


def assert_equal(one: tuple[list[float], bytes], other: tuple[list[float], bytes]) -> None:
    assert one[0] == pytest.approx(other[0], abs=BOUND, rel=0)
    ours, theirs = load(one[1]), load(other[1])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).abs().max()) <= BOUND, name


async def test_two_workers_train_what_one_does_and_survive_the_loss_of_one(
    place: Place, ray_head: RayHead
) -> None:
    await place.start("eng-alone")
    place.jobs.offer(place.attempt("alone", 1, EPOCHS))
    await place.until(lambda: bool(place.jobs.job.outcomes))
    alone = await trained(place)
    place.engines[-1].send_signal(signal.SIGTERM)
    assert await place.engines[-1].wait() == 0

    place.jobs.job = FakeJob()
    engine = await place.start("eng-two", **on_two(ray_head))
    place.jobs.offer(place.attempt("two", 1, EPOCHS))
    await place.until(lambda: bool(place.jobs.job.outcomes))
    assert_equal(await trained(place), alone)

    engine.send_signal(signal.SIGTERM)
    assert await engine.wait() == 0
    # It is Ray's handler that writes this: it aborts the process when it drains for more than three seconds.
    assert "SIGTERM received" not in (place.folder / "eng-two.log").read_text()

    place.jobs.job = FakeJob()
    sharded = on_two(ray_head) | {"LATHE_ENGINE_SHARD_BASE": "always"}
    engine = await place.start("eng-sharded", **sharded)
    place.jobs.offer(place.attempt("parts", 1, EPOCHS))
    await place.until(lambda: bool(place.jobs.job.checkpoints))
    [warning] = [note for note in place.jobs.job.notes if note.kind == "sharded"]
    assert (warning.step, warning.data["workers"]) == (0, "2")
    # Ray ends the one of the engine before in its own time.
    await place.until(lambda: len(actors()) == 1)
    [worker] = actors()
    os.kill(worker, signal.SIGKILL)
    await place.until(lambda: bool(place.jobs.job.outcomes))
    # A loss that is noticed behind a whole step is told by leaving: the job is given back before a pass fails.
    assert place.jobs.job.outcomes in ([Outcome.WORKER_LOST], [Outcome.RELEASED])
    assert await engine.wait() == 0
    place.jobs.job.outcomes.clear()

    place.jobs.offer(place.attempt("parts", 2, EPOCHS))
    await place.start("eng-again", **sharded)
    await place.until(lambda: bool(place.jobs.job.outcomes))
    assert_equal(await trained(place), alone)
    assert len(place.jobs.job.checkpoints) == EPOCHS
    log = (place.folder / "eng-again.log").read_text()
    assert "The base model is sharded over 2 workers" in log
    assert "goes on from step" in log


async def test_workers_that_are_not_there_in_time_are_told_of(place: Place, ray_head: RayHead) -> None:
    too_many = on_two(ray_head) | {"LATHE_ENGINE_WORKERS": "9", "LATHE_ENGINE_GANG_TIMEOUT_S": "1"}
    engine = await place.start("eng-nine", registers=False, **too_many)
    assert await engine.wait() != 0
    assert "Ray has no room for 8 more workers" in place.logs()
