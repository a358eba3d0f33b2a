"""DPO, IPO, ORPO and KTO on a tiny model: what they learn and keep, and that slices and company change nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lathe.common.errors import DataLoss, InvalidArgument
from lathe.common.metrics import Metrics
from lathe.engine.batch import TrainRow, TrainSlice, trained_tokens
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
from lathe.engine.recipes.kto import mismatched
from lathe.engine.recipes.methods import recipe_of
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.saving import Start
from lathe.engine.recipes.turns import Forward, Turn
from lathe.engine.training import Trainer
from lathe.text.formats import Role
from tests.fakes.clock import FakeClock
from tests.fixtures.tiny_chat import write_tiny_chat
from tests.fixtures.turns import scores, served
from tests.unit.engine.conftest import MakeEngine

METHODS: dict[str, Method] = {
    "dpo": Dpo(beta=0.5), "ipo": Dpo(beta=0.5, loss_type="ipo"), "orpo": Orpo(beta=0.5), "kto": Kto(beta=0.5),
}  # fmt: skip
CONFIG = TrainingConfig(
    n_epochs=2, batch_size=4, learning_rate=0.02, seed=3, lora_r=4, target_modules=("q_proj", "v_proj", "down_proj"),
    base_model="baseModels/tiny",
)  # fmt: skip
every_method = pytest.mark.parametrize("name", METHODS)


def pairs(n: int, seed: int = 0) -> list[TrainRow]:
    """n prompts, each with two answers of its own, of 3 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    rows = []
    for line in range(1, n + 1):
        prompt = tokens(2, 6)
        for role in (Role.CHOSEN, Role.REJECTED):
            answer = tokens(3, 8)
            rows.append(TrainRow(prompt + answer, [False] * len(prompt) + [True] * len(answer), role, line))
    return rows


def against_the_base(engine: Engine, rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The pairs, with the answer that the base finds less likely as the chosen one."""
    turned = []
    for one, other in zip(rows[0::2], rows[1::2], strict=True):
        likely = scores(engine, "", [one, other])
        first, second = (one, other) if likely[0] < likely[1] else (other, one)
        turned += [replace(first, role=Role.CHOSEN), replace(second, role=Role.REJECTED)]
    return turned


VERDICTS = {Role.CHOSEN: Role.DESIRABLE, Role.REJECTED: Role.UNDESIRABLE}


def rows_for(method: Method, rows: Sequence[TrainRow]) -> list[TrainRow]:
    """Pairs, as the method takes them."""
    if not isinstance(method, Kto):
        return list(rows)
    return [replace(row, role=VERDICTS.get(row.role, row.role)) for row in rows]


class Bench:
    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine

    def run(
        self,
        method: Method,
        rows: Sequence[TrainRow],
        key: str = "a",
        *,
        validation: Sequence[TrainRow] = (),
        config: TrainingConfig = CONFIG,
        slice_tokens: int = 40,
        start: Start | None = None,
        initial: Path | None = None,
    ) -> Run:
        return Run(
            recipe_of(method),
            engine=self.engine,
            key=key,
            data=TrainData(rows_for(method, rows), rows_for(method, validation)),
            config=replace(config, method=method),
            plan=SlicePlan(slice_tokens, 1, "float32", "cpu"),
            folder=lambda kind, step: self.folder / f"{key}-{kind}-{step}",
            clock=FakeClock(),
            start=start,
            initial_adapter=initial,
        )

    def told(self, *job: Any, **settings: Any) -> list[Turn]:
        """Everything that a whole run of it says."""
        return list(served(self.run(*job, **settings).turns(), self.engine))


@pytest.fixture
def bench(tmp_path: Path, make_engine: MakeEngine) -> Bench:
    return Bench(tmp_path, make_engine())


def steps_of(told: Sequence[object]) -> list[StepMetrics]:
    return [event for event in told if isinstance(event, StepMetrics)]


def first_snapshot(told: Sequence[object]) -> Snapshot:
    return next(event for event in told if isinstance(event, Snapshot))


def last_snapshot(told: Sequence[object]) -> Snapshot:
    return [event for event in told if isinstance(event, Snapshot)][-1]


def weights(snapshot: Snapshot) -> bytes:
    return (snapshot.folder / "adapter_model.safetensors").read_bytes()


def margins(engine: Engine, key: str, rows: Sequence[TrainRow]) -> list[float]:
    found = zip(scores(engine, key, rows), rows, strict=True)
    sums = [score / trained_tokens(row) for score, row in found]
    return [chosen - rejected for chosen, rejected in zip(sums[0::2], sums[1::2], strict=True)]


@every_method
def test_it_learns_to_prefer_what_the_base_did_not(bench: Bench, name: str) -> None:
    rows = against_the_base(bench.engine, pairs(6))
    steps = steps_of(bench.told(METHODS[name], rows, config=replace(CONFIG, n_epochs=6)))
    first, last = steps[0].figures, steps[-1].figures
    assert last["rewards/margins"] > first["rewards/margins"] + 0.5
    assert steps[-1].train_loss < steps[0].train_loss
    # IPO regresses to a margin over the reference, so the pair that the base was surest of need not turn.
    assert sum(margin > 0 for margin in margins(bench.engine, "a", rows)) >= (4 if name == "ipo" else 6)
    if not isinstance(METHODS[name], Kto):
        assert last["rewards/accuracies"] >= 0.5


@pytest.mark.parametrize(("name", "loss"), [("dpo", math.log(2)), ("ipo", 1.0), ("kto", 0.5)])
def test_it_begins_at_its_reference(bench: Bench, name: str, loss: float) -> None:
    config = replace(CONFIG, n_epochs=1, batch_size=16)
    (step,) = steps_of(bench.told(METHODS[name], pairs(8), config=config))
    assert step.train_loss == pytest.approx(loss, abs=1e-5)
    assert step.figures["rewards/margins"] == pytest.approx(0, abs=1e-5)


@every_method
def test_slices_of_any_size_give_the_same_steps(tmp_path: Path, make_engine: MakeEngine, name: str) -> None:
    ended = {}
    for size in (1, 45, 999):
        bench = Bench(tmp_path / str(size), make_engine(dtype=torch.float64))
        told = bench.told(METHODS[name], pairs(5), slice_tokens=size)
        steps = steps_of(told)
        ended[size] = load_file(last_snapshot(told).folder / "adapter_model.safetensors"), steps
    tensors, steps = ended[999]
    for other_tensors, other_steps in (ended[1], ended[45]):
        for tensor in tensors:
            torch.testing.assert_close(other_tensors[tensor], tensors[tensor], atol=1e-9, rtol=0)
        for one, other in zip(steps, other_steps, strict=True):
            assert other.train_loss == pytest.approx(one.train_loss, abs=1e-9)
            assert figures_that_hold(other) == pytest.approx(figures_that_hold(one), abs=1e-8)


def figures_that_hold(step: StepMetrics) -> dict[str, float]:
    """The first step begins at its reference: its margins are zero but for a rounding, whose sign is not the slices' to
    keep (it differs from one kind of CPU to another), so the share of margins above zero says nothing there."""
    return {name: value for name, value in step.figures.items() if step.step > 1 or "accuracies" not in name}


def told_without_times(told: Sequence[object]) -> list[StepMetrics]:
    return [replace(step, step_seconds=0, tokens_per_second=0) for step in steps_of(told)]


@every_method
def test_stopped_anywhere_and_gone_on_the_bits_are_the_same(
    tmp_path: Path, make_engine: MakeEngine, name: str
) -> None:
    method, rows, held_out, config = METHODS[name], pairs(5), pairs(2, seed=1), replace(CONFIG, n_epochs=2)
    whole = Bench(tmp_path / "whole", make_engine())
    told = list(served(whole.run(method, rows, validation=held_out, config=config).turns(), whole.engine))
    for stop_after in (1, len(told) // 3, len(told) // 2, len(told) - 2):
        bench = Bench(tmp_path / str(stop_after), make_engine())
        run = bench.run(method, rows, "first", validation=held_out, config=config)
        for _ in islice(served(run.turns(), bench.engine), stop_after):
            pass
        snapshot, start = run.snapshot(), None
        if snapshot is not None:
            start = Start(snapshot.folder, snapshot.step, snapshot.trained_tokens, state=snapshot.state)
        again = bench.run(method, rows, "again", validation=held_out, config=config, start=start)
        gone_on = list(served(again.turns(), bench.engine))
        assert weights(last_snapshot(gone_on)) == weights(last_snapshot(told))
        steps = told_without_times(gone_on)
        assert steps == told_without_times(told)[-len(steps) :]


def test_the_reference_is_computed_once(bench: Bench) -> None:
    rows = pairs(5)
    told = bench.told(METHODS["dpo"], rows)
    assert sum(len(piece.rows) for piece in scored_by_the_base(told)) == len(rows)
    epoch = first_snapshot(told)
    start = Start(epoch.folder, epoch.step, epoch.trained_tokens, state=epoch.state)
    assert not scored_by_the_base(bench.told(METHODS["dpo"], rows, "b", start=start))


def scored_by_the_base(told: Sequence[Turn]) -> list[TrainSlice]:
    passes = [turn.pieces for turn in told if isinstance(turn, Forward)]
    return [piece for pieces in passes for piece in pieces if not piece.key]


def test_fused_with_a_supervised_job_each_is_as_alone(tmp_path: Path, make_engine: MakeEngine) -> None:
    jobs: dict[str, tuple[Method, list[TrainRow]]] = {
        name: (METHODS[name], pairs(4, seed=seed)) for seed, name in enumerate(METHODS)
    }
    jobs["supervised"] = (Supervised(), [replace(row, role=Role.EXAMPLE) for row in pairs(4, seed=9)])
    alone, together = (
        Bench(tmp_path / name, make_engine(dtype=torch.float64)) for name in ("alone", "together")
    )
    solo = {key: alone.told(*job, key) for key, job in jobs.items()}
    fused: dict[str, list[object]] = {key: [] for key in jobs}
    trainer = Trainer(together.engine, FakeClock(), Metrics(), fused_tokens=400, slowdown=1.6)
    for key, job in jobs.items():
        trainer.start(key, together.run(*job, key), fused[key].append)
    while trainer.turn():
        pass
    for key, told in solo.items():
        ours, theirs = (
            load_file(last_snapshot(events).folder / "adapter_model.safetensors")
            for events in (fused[key], told)
        )
        for tensor in theirs:
            torch.testing.assert_close(ours[tensor], theirs[tensor], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_on_top_of_a_tuned_model_that_model_is_the_reference(bench: Bench, name: str) -> None:
    rows = pairs(6)
    examples = [replace(row, role=Role.EXAMPLE) for row in rows]
    tuned = last_snapshot(bench.told(Supervised(), examples, "sft"))
    config = replace(CONFIG, n_epochs=2, batch_size=12)
    run = bench.run(METHODS[name], rows, "b", initial=tuned.folder, config=config)
    told = list(served(run.turns(), bench.engine))
    first, second, *_ = steps_of(told)
    # The tuned model is far from the base: rewards of 0 say that the reference is not the base.
    assert first.figures["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert second.figures["rewards/margins"] > 0.01
    epoch = first_snapshot(told)
    run.close()
    assert bench.engine.adapter_keys() == ("sft",)
    start = Start(epoch.folder, epoch.step, epoch.trained_tokens, state=epoch.state)
    again = bench.run(METHODS[name], rows, "c", initial=tuned.folder, config=config, start=start)
    assert weights(last_snapshot(list(served(again.turns(), bench.engine)))) == weights(last_snapshot(told))


def test_where_every_weight_is_trained_the_reference_stays_the_base(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "run", Engine.load(write_tiny_chat(tmp_path / "base"), dtype="float32"))
    config = replace(CONFIG, full_parameter=True, learning_rate=1e-3, n_epochs=2, batch_size=8)
    before = scores(bench.engine, "", pairs(4))
    first, second = steps_of(bench.told(METHODS["dpo"], pairs(4), config=config))
    assert first.train_loss == pytest.approx(math.log(2), abs=1e-5)
    assert second.figures["rewards/margins"] > 0
    assert scores(bench.engine, "", pairs(4)) == before


def test_validation_has_the_methods_own_loss_and_figures(bench: Bench) -> None:
    config = replace(CONFIG, n_epochs=1)
    run = bench.run(METHODS["dpo"], pairs(8), validation=pairs(4, seed=1), config=config)
    last = steps_of(list(served(run.turns(), bench.engine)))[-1]
    assert last.full_valid_loss is not None
    assert last.full_valid_loss < 2 * math.log(2)
    assert 0 <= last.figures["full_eval_rewards/accuracies"] <= 1
    assert {"rewards/margins", "eval_rewards/margins", "full_eval_rewards/margins"} <= last.figures.keys()


def test_rows_of_another_method_are_refused_with_their_line(bench: Bench) -> None:
    examples = [TrainRow([1, 2, 3], [False, True, True], line=4)]
    with pytest.raises(InvalidArgument, match=r"Line 4 of the training file is example .* takes chosen"):
        bench.run(Dpo(), examples)
    with pytest.raises(InvalidArgument, match=r"Line 4 .* takes desirable or undesirable"):
        bench.run(Kto(), examples)
    with pytest.raises(InvalidArgument, match="ends within a pair"):
        bench.run(Orpo(), pairs(2)[:3])


def test_a_reference_file_of_other_data_or_a_torn_one_is_refused(bench: Bench) -> None:
    config = replace(CONFIG, n_epochs=1)
    told = bench.told(Dpo(), pairs(4), config=config)
    epoch = first_snapshot(told)
    start = Start(epoch.folder, epoch.step, epoch.trained_tokens, state=epoch.state)
    with pytest.raises(DataLoss, match="other data"):
        bench.told(Dpo(), pairs(5), "b", config=config, start=start)
    file = epoch.folder / "reference.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(DataLoss, match="cannot be read"):
        bench.told(Dpo(), pairs(4), "c", config=config, start=start)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=2, max_size=6), st.integers(6, 12))
def test_mismatched_rows_have_their_own_prompt_and_the_answer_before(
    shapes: list[tuple[int, int]], limit: int
) -> None:
    rows = [
        TrainRow([10 * i] * prompt + [10 * i + 1] * answer, [False] * prompt + [True] * answer)
        for i, (prompt, answer) in enumerate(shapes)
    ]
    for i, strange in enumerate(mismatched(rows, limit)):
        (prompt, _), (_, answer) = shapes[i], shapes[i - 1]
        before = 10 * ((i - 1) % len(rows))
        whole = [10 * i] * prompt + [before + 1] * answer
        assert strange.tokens == whole[:limit]
        assert strange.mask == ([False] * prompt + [True] * answer)[:limit]


def test_a_row_alone_has_no_mismatched_answer() -> None:
    assert mismatched([TrainRow([1, 2], [False, True])], 9) == []
