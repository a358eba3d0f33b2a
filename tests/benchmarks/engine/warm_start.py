"""A job on an engine that holds its base already: from the lease in hand to the first training pass.

All that lies between is there: the token object is fetched from a folder store, hashed and read, earlier checkpoints
are looked for, the adapter is made, and the model thread is told. Only `jobs` is a fake, which answers at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lathe.common.clock import SystemClock
from lathe.common.objectstore.folder import FolderStore
from lathe.engine.attempts import AttemptRunner
from lathe.engine.batch import SliceResult, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.loop import ModelLoop
from lathe.engine.model import Attempt, Outcome, TokenRef
from lathe.engine.preparing import AttemptSettings
from lathe.engine.rows import read_rows
from lathe.text.arrow import TokenRow, write_tokens
from lathe.text.formats import Role
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Setting, Turns, alternate
from tests.benchmarks.engine.verbs import loaded_apart, model_thread, slice_plan, training_config
from tests.fakes.worker_jobs import FakeJobs

ROWS = 512
TIMEOUT_S = 120.0


def measure(setting: Setting) -> dict[str, float]:
    result = alternate({"ours": "tests.benchmarks.engine.warm_start:ours"}, setting)["ours"]
    return {
        "warm_start_s": statistics.median(row.figures["first_pass_s"] for row in result.warm),
        "warm_start_step_done_s": statistics.median(row.figures["first_step_s"] for row in result.warm),
        "first_job_start_s": result.rounds[0].figures["first_pass_s"],
    }


class WatchedEngine(Engine):
    """Notes when a training pass begins, and when an optimiser's step is done."""

    passes: list[float]
    steps: list[float]
    stepped: threading.Event

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        self.passes.append(time.perf_counter())
        return super().forward_backward(pieces)

    def optim_step(self, key: str, lr: float, *, clip: float = 1.0, weight_decay: float = 0.0) -> float:
        norm = super().optim_step(key, lr, clip=clip, weight_decay=weight_decay)
        self.steps.append(time.perf_counter())
        self.stepped.set()
        return norm


def ours(setting: Setting, turns: Turns) -> None:
    engine = loaded_apart(lambda: WatchedEngine.load(setting.folder, threads=setting.threads))
    number = 0
    with tempfile.TemporaryDirectory() as name, model_thread(engine) as loop:
        folder = Path(name)
        data = token_object(setting, folder / "store")
        while turns.wait():
            number += 1
            engine.passes, engine.steps, engine.stepped = [], [], threading.Event()
            began = time.perf_counter()
            asyncio.run(one_job(engine, loop, folder, data, number))
            turns.report(first_pass_s=engine.passes[0] - began, first_step_s=engine.steps[0] - began)


def token_object(setting: Setting, store: Path) -> TokenRef:
    path = store / "blobs" / "tokens"
    path.parent.mkdir(parents=True)
    rows = [
        TokenRow(tokens=list(row.tokens), mask=bytes(row.mask), line=line, role=Role.EXAMPLE)
        for line, row in enumerate(model.chat_rows(setting.folder, ROWS), 1)
    ]
    write_tokens(path, rows, {})
    return TokenRef("blobs/tokens", hashlib.sha256(path.read_bytes()).hexdigest())


async def one_job(engine: WatchedEngine, loop: ModelLoop, folder: Path, data: TokenRef, number: int) -> None:
    jobs = FakeJobs(SystemClock())
    jobs.offer(
        Attempt(
            f"a{number}",
            "token",
            "projects/p/jobs/j",
            f"jobs/j/a{number}/",
            data,
            training_config(model.BATCH),
        )
    )
    attempt = await jobs.lease("bench")
    assert attempt is not None
    settings = AttemptSettings(folder / "work", folder / "cache", slice_plan(engine), read_rows)
    runner = AttemptRunner(
        attempt=attempt,
        engine=engine,
        loop=loop,
        jobs=jobs,
        store=FolderStore(folder / "store"),
        clock=SystemClock(),
        settings=settings,
    )
    running = asyncio.create_task(runner.run())
    if not await asyncio.to_thread(engine.stepped.wait, TIMEOUT_S):
        raise RuntimeError(f"no step was done in {TIMEOUT_S:.0f} s")
    runner.stop(Outcome.CANCELLED)
    await running
    if jobs.job.outcomes != [Outcome.CANCELLED]:
        raise RuntimeError(f"the job ended as {jobs.job.outcomes}: {jobs.job.error}")
