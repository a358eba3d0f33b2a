"""Four jobs at once on one engine, whose slices share passes, beside the same four one after another.

Both are run by the model loop, from start to the final snapshot. Small jobs: batch 1, rows of about 50 tokens. At
batch 8 a slice fills a pass by itself: fusing must cost nothing there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lathe.common.clock import SystemClock
from lathe.engine.batch import TrainRow
from lathe.engine.engine import Engine
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import AttemptEvent, Ended, Outcome
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Setting, Turns, alternate, clock
from tests.benchmarks.engine.verbs import supervised, until

JOBS = 4
# As many as a few hundred examples give: what begins and ends a job (0.2 s) is then little beside its steps.
SMALL_STEPS, LARGE_STEPS = 32, 2
SHORT = 50


def measure(setting: Setting) -> dict[str, float]:
    rounds = alternate({"ours": "tests.benchmarks.engine.fused:ours"}, setting)["ours"].warm

    def ratio(above: str, below: str) -> float:
        return statistics.median(row.figures[above] / row.figures[below] for row in rounds)

    tokens = statistics.median(row.figures["small_tokens"] / row.figures["fused_s"] for row in rounds)
    return {
        "fused4_tokens_per_s": tokens,
        "fused4_vs_sequential": ratio("sequential_s", "fused_s"),
        "fused_first_job_vs_solo": ratio("first_job_s", "solo_s"),
        "fused4_batch8_vs_sequential": ratio("sequential8_s", "fused8_s"),
    }


def ours(setting: Setting, turns: Turns) -> None:
    engine = model.load_engine(setting)
    small = [short_rows(setting, SMALL_STEPS, job) for job in range(JOBS)]
    large = [model.chat_rows(setting.folder, model.BATCH * LARGE_STEPS)] * JOBS
    now = lambda: clock(setting.threads)  # noqa: E731
    while turns.wait():
        fused = at_once(engine, small, 1, now)
        sequential = [at_once(engine, [rows], 1, now)[0] for rows in small]
        fused8 = at_once(engine, large, model.BATCH, now)
        sequential8 = [at_once(engine, [rows], model.BATCH, now)[0] for rows in large]
        turns.report(
            fused_s=max(fused),
            first_job_s=fused[0],
            solo_s=sequential[0],
            sequential_s=sum(sequential),
            fused8_s=max(fused8),
            sequential8_s=sum(sequential8),
            small_tokens=sum(len(row.tokens) for rows in small for row in rows),
        )


def short_rows(setting: Setting, count: int, job: int) -> list[TrainRow]:
    """The last tokens of chat rows: about half of them trained."""
    rows = model.chat_rows(setting.folder, JOBS * count)[job * count : (job + 1) * count]
    return [TrainRow(row.tokens[-SHORT:], row.mask[-SHORT:]) for row in rows]


def at_once(
    engine: Engine, jobs: Sequence[Sequence[TrainRow]], batch: int, now: Callable[[], float]
) -> list[float]:
    """Seconds until each of these jobs, begun together, had ended."""
    ends: dict[int, float] = {}
    loop = ModelLoop(engine, SystemClock(), LoopLimits())

    def listener(number: int) -> Callable[[AttemptEvent], None]:
        def emit(event: AttemptEvent) -> None:
            if isinstance(event, Ended):
                if event.outcome is not Outcome.SUCCEEDED:
                    raise RuntimeError(f"job {number} ended as {event.outcome}: {event.error}")
                ends[number] = now()

        return emit

    with tempfile.TemporaryDirectory() as name, torch.enable_grad():
        runs = [
            supervised(engine, str(number), rows, Path(name), batch=batch) for number, rows in enumerate(jobs)
        ]
        began = now()
        for number, run in enumerate(runs):
            loop.start(str(number), run, listener(number))
        until(lambda: len(ends) == len(runs), loop)
    return [ends[number] - began for number in range(len(runs))]
