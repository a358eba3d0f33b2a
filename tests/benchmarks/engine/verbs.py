"""The engine's verbs and its loop, as the benchmarks use them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from lathe.common.clock import SystemClock
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import SlicePlan, TrainingConfig
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.sft import SupervisedRecipe
from tests.benchmarks.engine import model

E = TypeVar("E", bound=Engine)

SLICE_TOKENS = 320  # the setting's default on a CPU
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_step(engine: Engine, key: str, rows: Sequence[TrainRow], lr: float) -> float:
    """One step over these rows in one pass; the mean loss before it."""
    objective = CrossEntropy(sum(trained_tokens(row) for row in rows))
    (result,) = engine.forward_backward([TrainSlice(key, tuple(rows), objective)])
    engine.optim_step(key, lr)
    return result.loss_sum / result.tokens


def training_config(batch: int, epochs: int = 1) -> TrainingConfig:
    return TrainingConfig(
        n_epochs=epochs,
        batch_size=batch,
        learning_rate=1e-4,
        seed=0,
        lora_r=model.RANK,
        lora_alpha=model.ALPHA,
        target_modules=MODULES,
    )


def slice_plan(engine: Engine) -> SlicePlan:
    return SlicePlan(SLICE_TOKENS, torch.get_num_threads(), str(engine.dtype).removeprefix("torch."), "cpu")


def supervised(
    engine: Engine, name: str, rows: Sequence[TrainRow], folder: Path, *, batch: int, epochs: int = 1
) -> Run:
    """A job as an engine runs it, but that its snapshots stay in `folder`."""

    def place(kind: object, step: int) -> Path:
        made = folder / f"{name}-{kind}-{step}"
        made.mkdir(parents=True, exist_ok=True)
        return made

    return Run(
        SupervisedRecipe,
        engine=engine,
        key=f"train/{name}",
        data=TrainData(rows),
        config=training_config(batch, epochs),
        plan=slice_plan(engine),
        folder=place,
        clock=SystemClock(),
    )


def loaded_apart(load: Callable[[], E]) -> E:
    """An engine for a model thread, loaded by a thread that ends: see engine/apart.py."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load).result()


@contextmanager
def model_thread(engine: Engine) -> Iterator[ModelLoop]:
    """The loop in a thread of its own, as in an engine's process."""
    loop = ModelLoop(engine, SystemClock(), LoopLimits())
    threads = torch.get_num_threads()
    thread = threading.Thread(target=lambda: (torch.set_num_threads(threads), loop.run()))
    thread.start()
    try:
        yield loop
    finally:
        loop.stop()
        thread.join()


def until(done: Callable[[], bool], loop: ModelLoop) -> None:
    """Takes the loop's turns in this thread."""
    while not done():
        loop.run_once()
