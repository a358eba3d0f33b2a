"""What several workers cost and bring: python -m tests.benchmarks.distributed

A plain engine, a gang of one that Ray leads, and gangs of two on a whole and on a sharded base take turns with steps on
the same rows, SmolLM2-135M on one thread a worker (see engine/rounds.py). On two cores, two workers have both. Ray runs
already, as it does where KubeRay starts an engine. The last line is one JSON object.

    gang1_vs_plain         tokens/s of a gang of one beside a plain engine
    gang1_start_s          what Ray and the process group add to the load of the base; plain_start_s: that load
    two_vs_one             tokens/s of two workers beside one, both led through Ray
    sharded_vs_whole       tokens/s of two workers on a sharded base beside two on a whole one
    sharded_base_mib       of the base, in one worker's memory outside of passes; whole_base_mib
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

import torch

from lathe.common.objectstore.folder import FolderStore
from lathe.engine.batch import CrossEntropy, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.settings import EngineSettings
from tests.benchmarks.engine.model import ALPHA, BATCH, RANK, ROOT, base_folder, chat_rows
from tests.benchmarks.engine.rounds import Result, Setting, Turns, alternate, median_ratio
from tests.fixtures.engine_process import put_base
from tests.fixtures.ray import run_ray

HERE = "tests.benchmarks.distributed"
CONTENDERS = ("plain", "gang1", "two", "sharded")
ROWS_PER_SLICE = 2
DIGEST = "0" * 64
RAY, DATA = "LATHE_BENCH_RAY", "LATHE_BENCH_DATA"


def plain(setting: Setting, turns: Turns) -> None:
    started = time.perf_counter()
    engine = Engine.load(setting.folder, threads=setting.threads)
    _steps(engine, setting, turns, time.perf_counter() - started)


def gang1(setting: Setting, turns: Turns) -> None:
    _gang(setting, turns, 1, "never")


def two(setting: Setting, turns: Turns) -> None:
    _gang(setting, turns, 2, "never")


def sharded(setting: Setting, turns: Turns) -> None:
    _gang(setting, turns, 2, "always")


def _gang(setting: Setting, turns: Turns, workers: int, shard_base: str) -> None:
    data = Path(os.environ[DATA])
    settings = EngineSettings.model_validate(
        {
            "engine_id": "bench",
            "base_model": "baseModels/smollm2",
            "base_digest": DIGEST,
            "jobs_address": "127.0.0.1:1",
            "store": {"kind": "folder", "folder": data / "store"},
            "cache_folder": data / "cache",
            "workers": workers,
            "threads": setting.threads,
            "ray_address": os.environ[RAY],
            "worker_cpus": 0.5,
            "shard_base": shard_base,
            "rank_timeout_s": 600,
        }
    )
    started = time.perf_counter()
    from lathe.engine.distributed.ray_gang import assemble

    engine = assemble(settings, setting.folder, lambda: None)
    _steps(engine, setting, turns, time.perf_counter() - started)


def _steps(engine: Engine, setting: Setting, turns: Turns, start_seconds: float) -> None:
    """A round is an optimizer step on one batch, a slice for each worker at a time."""
    rows = chat_rows(setting.folder, BATCH)
    tokens = sum(trained_tokens(row) for row in rows)
    slices = [
        TrainSlice("a", tuple(rows[first : first + ROWS_PER_SLICE]), CrossEntropy(tokens))
        for first in range(0, BATCH, ROWS_PER_SLICE)
    ]
    engine.create_adapter("a", LoraSpec(r=RANK, lora_alpha=ALPHA), seed=1)
    base_mib = engine.memory().base_bytes / (1 << 20)
    while turns.wait():
        started = time.perf_counter()
        loss = 0.0
        for first in range(0, len(slices), engine.workers):
            together = slices[first : first + engine.workers]
            loss += sum(result.loss for result in engine.forward_backward(together))
        engine.optim_step("a", 1e-4)
        turns.report(
            # Of the wall: what a worker waits for the other counts.
            seconds=time.perf_counter() - started,
            tokens=sum(len(row.tokens) for row in rows),
            loss=loss,
            start_s=start_seconds,
            base_mib=base_mib,
        )


def figures_of(results: dict[str, Result]) -> dict[str, float]:
    """Raises RuntimeError when the contenders did not train the same."""
    losses = {name: [row.figures["loss"] for row in result.rounds] for name, result in results.items()}
    for name, found in losses.items():
        apart = max(abs(a - b) for a, b in zip(found, losses["plain"], strict=True))
        print(f"{name:8} losses {[round(loss, 4) for loss in found]}, {apart:.1g} from plain's", flush=True)
        if apart > 0.02:
            raise RuntimeError(f"{name} does not train what a plain engine does: {found}, {losses['plain']}")
    speed = {name: result.speed("tokens") for name, result in results.items()}
    said = {name: result.rounds[0].figures for name, result in results.items()}
    return {
        **{f"{name}_tok_s": statistics.median(found) for name, found in speed.items()},
        **{f"{name}_start_s": figures["start_s"] for name, figures in said.items()},
        "gang1_vs_plain": median_ratio(speed["gang1"], speed["plain"]),
        "two_vs_one": median_ratio(speed["two"], speed["gang1"]),
        "sharded_vs_whole": median_ratio(speed["sharded"], speed["two"]),
        "whole_base_mib": said["two"]["base_mib"],
        "sharded_base_mib": said["sharded"]["base_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="warm steps of each contender")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "bench", help="where the model is kept")
    options = parser.parse_args()
    setting = Setting(base_folder(options.data), threads=1, rounds=options.rounds)
    os.environ[DATA] = str(options.data)
    store = FolderStore(options.data / "store")
    asyncio.run(put_base(store, setting.folder, DIGEST))
    with run_ray() as head:
        os.environ[RAY] = head.address
        results = alternate({name: f"{HERE}:{name}" for name in CONTENDERS}, setting)
    figures = {"torch_threads": float(setting.threads), "cores": float(len(os.sched_getaffinity(0)))}
    figures |= figures_of(results)
    for key, value in figures.items():
        print(f"{key:24} {value:.4g}", flush=True)
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
