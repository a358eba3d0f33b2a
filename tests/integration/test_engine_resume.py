"""Killed engines: the job's losses, checkpoints and weights are the bits of an undisturbed one.

`make acceptance-resume` does the same with 20 kills.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from lathe.engine.model import TrainingConfig, WeightComparison
from tests.fixtures.engine_kills import job_of, killed, ragged_rows, undisturbed
from tests.fixtures.engine_process import engine_place

KILLS = 2


async def test_killed_at_random_steps_nothing_is_different(tmp_path: Path) -> None:
    config = TrainingConfig(
        n_epochs=20,
        batch_size=8,
        learning_rate=1e-2,
        seed=5,
        warmup_fraction=0.1,
        weight_decay=0.01,
        lora_r=4,
        lora_dropout=0.1,
        target_modules=("q_proj", "v_proj", "down_proj"),
        base_model="baseModels/tiny",
    )
    async with engine_place(tmp_path) as place:
        rows = ragged_rows(100, 1)
        whole = await undisturbed(place, await job_of(place, "whole", config, rows))
        parts, at = await killed(place, await job_of(place, "parts", config, rows), KILLS, random.Random(3))
        receipt = place.jobs.job.receipt
        measured = (place.folder / "cache" / "memory.jsonl").read_text().splitlines()
    print("killed after steps", at)
    assert parts.losses == whole.losses
    assert parts.checkpoints == whole.checkpoints
    assert parts.weights == whole.weights
    assert receipt is not None
    assert receipt.comparison == WeightComparison(bit_identical=True)
    assert receipt.weights_sha256 == hashlib.sha256(whole.weights).hexdigest()
    assert receipt.environment.flags["num_threads"] == "1" and not receipt.fused
    # A trial and the heaviest slice, by the first engine; the others knew.
    assert len(measured) == 2
