"""A chat beside a running job: the gaps between the tokens of one stream, and what the job loses.

The promise is a p99 of at most one second on two cores.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from pathlib import Path

from lathe.engine.loop import ModelLoop
from lathe.engine.model import AttemptEvent, StepMetrics
from lathe.engine.sampling import Sampled, SamplingParams
from tests.benchmarks.engine import model
from tests.benchmarks.engine.rounds import Setting, Turns, alternate
from tests.benchmarks.engine.verbs import loaded_apart, model_thread, supervised

TOKENS, ALONE, PROMPT = 60, 32, 128
TIMEOUT_S = 120.0


def measure(setting: Setting) -> dict[str, float]:
    """Gaps of all warm rounds together."""
    rounds = alternate({"ours": "tests.benchmarks.engine.interleave:ours"}, setting)["ours"].warm
    gaps = sorted(row.figures[f"gap_{i}"] for row in rounds for i in range(TOKENS - 1))
    alone = [row.figures["gap_alone"] for row in rounds]
    return {
        "token_gap_beside_job_p50_s": statistics.median(gaps),
        "token_gap_beside_job_p99_s": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "token_gap_beside_job_max_s": gaps[-1],
        "token_gap_alone_p50_s": statistics.median(alone),
        "train_tokens_per_s_alone": statistics.median(row.figures["train_alone"] for row in rounds),
        "train_tokens_per_s_beside_a_stream": statistics.median(
            row.figures["train_beside"] for row in rounds
        ),
    }


def ours(setting: Setting, turns: Turns) -> None:
    engine = loaded_apart(lambda: model.load_engine(setting))
    rows = model.chat_rows(setting.folder, 400)
    steps: list[StepMetrics] = []

    def emit(event: AttemptEvent) -> None:
        if isinstance(event, StepMetrics):
            steps.append(event)

    number = 0
    while turns.wait():
        number += 1
        steps.clear()
        with tempfile.TemporaryDirectory() as folder, model_thread(engine) as loop:
            alone = gaps(loop, ALONE, seed=2 * number)
            run = supervised(engine, str(number), rows, Path(folder), batch=model.BATCH, epochs=50)
            loop.start(str(number), run, emit)
            wait_for(steps, 3)
            trained = speed(steps[1:])
            before = len(steps)
            beside = gaps(loop, TOKENS, seed=2 * number + 1)
            wait_for(steps, before + 2)
            loop.cancel_attempt(str(number))
        run.close()
        turns.report(
            gap_alone=statistics.median(alone),
            train_alone=trained,
            train_beside=speed(steps[before + 1 :]),
            **{f"gap_{i}": gap for i, gap in enumerate(beside)},
        )


def gaps(loop: ModelLoop, tokens: int, *, seed: int) -> list[float]:
    """Seconds between the tokens of one greedy stream."""
    ready = threading.Event()
    (prompt,) = model.prompts(1, PROMPT, seed)
    stream = loop.open("", prompt, SamplingParams(max_tokens=tokens, temperature=0.0), ready.set)
    times: list[float] = []
    while len(times) < tokens:
        if not ready.wait(TIMEOUT_S):
            raise RuntimeError(f"no token came for {TIMEOUT_S:.0f} s")
        ready.clear()
        now = time.monotonic()
        for item in stream.take():
            if isinstance(item, Exception):
                raise item
            times += [now] if isinstance(item, Sampled) else []
    return [b - a for a, b in itertools.pairwise(times)]


def wait_for(steps: list[StepMetrics], count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(steps) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job made {len(steps)} steps in {TIMEOUT_S:.0f} s")
        time.sleep(0.01)


def speed(steps: list[StepMetrics]) -> float:
    return statistics.median(row.tokens_per_second for row in steps)
