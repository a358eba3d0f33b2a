"""A chat beside a running job: the gaps between its tokens, at SmolLM2-135M's shape with random weights.

    python tests/benchmarks/bench_interleave.py [--threads 2] [--tokens 120] [--slice 320]

The promise is a p99 below one second. The job's speed alone and beside the chat is measured in the same run. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lathe.common.clock import SystemClock
from lathe.engine.base import Decoder
from lathe.engine.batch import TrainRow
from lathe.engine.engine import Engine
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import AttemptEvent, SlicePlan, StepMetrics, TrainingConfig
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.sft import SupervisedRecipe
from lathe.engine.sampling import Sampled, SamplingParams
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import choose_dtype, random_weights
from tests.benchmarks.bench_engine import CONFIG, LENGTHS

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = 128


def build(dtype: str) -> Engine:
    spec = DecoderSpec.from_config(CONFIG)
    device = torch.device("cpu")
    weights = random_weights(spec, device=device, dtype=choose_dtype(dtype, device))
    return Engine(Decoder(spec, weights))


def job(engine: Engine, folder: Path, slice_tokens: int, threads: int) -> Run:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(400):
        length = LENGTHS[number % len(LENGTHS)]
        tokens = torch.randint(0, 49152, (length,), generator=generator).tolist()
        rows.append(TrainRow(tokens, [place >= length - 47 for place in range(length)]))
    config = TrainingConfig(n_epochs=50, batch_size=8, learning_rate=1e-4, seed=0, target_modules=MODULES)
    return Run(
        SupervisedRecipe,
        engine=engine,
        key="train/bench",
        data=TrainData(rows),
        config=config,
        plan=SlicePlan(slice_tokens, threads, str(engine.dtype), "cpu"),
        folder=lambda kind, step: folder / f"{kind}-{step}",
        clock=SystemClock(),
    )


def token_times(loop: ModelLoop, tokens: int) -> list[float]:
    """When each token of one greedy stream came, in seconds."""
    ready = threading.Event()
    prompt = [(7 * place) % 49152 for place in range(PROMPT)]
    stream = loop.open("", prompt, SamplingParams(max_tokens=tokens, temperature=0.0), ready.set)
    times: list[float] = []
    while len(times) < tokens:
        ready.wait(60)
        ready.clear()
        now = time.monotonic()
        times += [now for item in stream.take() if isinstance(item, Sampled)]
    return times


def speed(steps: list[StepMetrics]) -> float:
    return round(statistics.median(row.tokens_per_second for row in steps), 1) if steps else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--slice", type=int, default=320)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine = build(arguments.dtype)
    loop = ModelLoop(engine, SystemClock(), LoopLimits())
    steps: list[StepMetrics] = []

    def emit(event: AttemptEvent) -> None:
        if isinstance(event, StepMetrics):
            steps.append(event)

    def model() -> None:
        torch.set_num_threads(arguments.threads)
        loop.run()

    with TemporaryDirectory() as name:
        thread = threading.Thread(target=model)
        thread.start()
        try:
            token_times(loop, 8)
            alone = token_times(loop, 32)
            loop.start("bench", job(engine, Path(name), arguments.slice, arguments.threads), emit)
            while len(steps) < 4:
                time.sleep(0.1)
            training_alone = speed(steps[1:])
            before, opened = len(steps), time.monotonic()
            beside = token_times(loop, arguments.tokens)
            training_beside = speed(steps[before + 1 :])
        finally:
            loop.stop()
            thread.join()
    gaps = sorted(b - a for a, b in itertools.pairwise(beside))
    result = {
        "p50_gap_s": round(statistics.median(gaps), 4),
        "p99_gap_s": round(gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))], 4),
        "max_gap_s": round(gaps[-1], 4),
        "first_token_s": round(beside[0] - opened, 4),
        "p50_gap_alone_s": round(statistics.median(b - a for a, b in itertools.pairwise(alone)), 4),
        "train_tokens_per_s_alone": training_alone,
        "train_tokens_per_s_beside": training_beside,
        "slice_tokens": arguments.slice,
        "threads": arguments.threads,
        "dtype": str(engine.dtype).removeprefix("torch."),
    }
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
