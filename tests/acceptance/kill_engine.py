"""Kills engine processes at random steps of one job, and compares all that the job said and made bit for bit.

    python -m tests.acceptance.kill_engine [--times 20] [--seed 1] [--method supervised|dpo|orpo|kto]

The job trains with all that has a state: warm-up and decay, dropout, weight decay, validation, several epochs of
rows of many lengths. Each engine is a process that gets SIGKILL once jobs has heard of a random step, at any moment of
the step or the checkpoint behind it; the next one goes on from what is in the store. Losses and all other measures of
every step, each epoch's checkpoint (optimizer included) and the final weights must be those of an undisturbed job on an
equal engine. Prints one line of JSON at the end; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from lathe.engine.model import Dpo, Kto, Method, Orpo, Supervised, TrainingConfig
from tests.fixtures.engine_kills import Told, job_of, killed, ragged_rows, undisturbed
from tests.fixtures.engine_process import engine_place

METHODS: dict[str, Method] = {"supervised": Supervised(), "dpo": Dpo(), "orpo": Orpo(), "kto": Kto()}
EXAMPLES = 200


def config_of(method: Method) -> TrainingConfig:
    return TrainingConfig(
        n_epochs=20,
        batch_size=8,
        learning_rate=5e-3,
        seed=5,
        warmup_fraction=0.1,
        weight_decay=0.01,
        lora_r=4,
        lora_dropout=0.1,
        target_modules=("q_proj", "v_proj", "down_proj"),
        base_model="baseModels/tiny",
        method=method,
    )


def difference(parts: Told, whole: Told) -> str:
    """What is not the same; empty if nothing."""
    for step in sorted(whole.losses):
        if parts.losses[step] != whole.losses[step]:
            return f"step {step}: {parts.losses[step]} and not {whole.losses[step]}"
    if parts.checkpoints != whole.checkpoints:
        return "a checkpoint's files"
    return "" if parts.weights == whole.weights else "the final weights"


async def run(method: str, times: int, seed: int) -> dict[str, object]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lathe-kill-engine-") as name:
        async with engine_place(Path(name)) as place:
            config, rows = config_of(METHODS[method]), ragged_rows(EXAMPLES, seed, METHODS[method])
            whole = await undisturbed(place, await job_of(place, "whole", config, rows))
            job = await job_of(place, "parts", config, rows)
            parts, at = await killed(place, job, times, random.Random(seed))
    return {
        "method": method,
        "seed": seed,
        "steps": len(whole.losses),
        "killed_after_steps": at,
        "seconds": round(time.monotonic() - started),
        "different": difference(parts, whole),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", choices=tuple(METHODS), default="supervised")
    options = parser.parse_args()
    result = asyncio.run(run(options.method, options.times, options.seed))
    print(json.dumps(result))
    return 1 if result["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
