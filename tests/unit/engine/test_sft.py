"""Supervised LoRA on the fake engine: what is trained, measured, saved and resumed."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lathe.common.errors import DataLoss, FailedPrecondition, InvalidArgument
from lathe.engine.batch import CrossEntropy, SliceResult, TrainRow, TrainSlice, trained_tokens
from lathe.engine.model import Note, SlicePlan, Snapshot, SnapshotKind, StepMetrics, TrainingConfig
from lathe.engine.recipes.recipe import Job, TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.samples import Speech, held_out
from lathe.engine.recipes.saving import Start
from lathe.engine.recipes.sft import SupervisedRecipe
from lathe.engine.recipes.turns import Blocked, Forward, Turn
from lathe.text.formats import Role
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine
from tests.fixtures.turns import served

CONFIG = TrainingConfig(
    n_epochs=2,
    batch_size=4,
    learning_rate=1e-3,
    seed=3,
    warmup_fraction=0.2,
    lora_r=4,
    target_modules=("q_proj", "v_proj"),
    base_model="baseModels/tiny",
)
PLAN = SlicePlan(16, 1, "float32", "cpu")


def rows(n: int, length: int = 8) -> list[TrainRow]:
    return [TrainRow([row] * length, [False] * 2 + [True] * (length - 2), line=row + 1) for row in range(n)]


class Bench:
    def __init__(self, folder: Path, engine: FakeEngine | None = None) -> None:
        self.engine, self.clock, self.folder = engine or FakeEngine(), FakeClock(), folder

    def turns(self, *arguments: Any, **options: Any) -> Iterator[Turn]:
        return served(self.run(*arguments, **options).turns(), self.engine)

    def run(
        self,
        key: str = "a",
        *,
        training: int = 10,
        validation: int | Sequence[TrainRow] = 0,
        config: TrainingConfig = CONFIG,
        start: Start | None = None,
        initial: Path | None = None,
        halvings: tuple[tuple[int, int], ...] = (),
        speech: Speech | None = None,
    ) -> Run:
        return Run(
            SupervisedRecipe,
            engine=self.engine,  # type: ignore[arg-type]
            key=key,
            data=TrainData(rows(training), rows(validation) if isinstance(validation, int) else validation),
            config=config,
            plan=PLAN,
            folder=lambda kind, step: self.folder / f"{key}-{kind}-{step}",
            clock=self.clock,
            start=start,
            initial_adapter=initial,
            halvings=halvings,
            speech=speech,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def metrics_of(events: list[Turn]) -> list[StepMetrics]:
    return [event for event in events if isinstance(event, StepMetrics)]


def snapshots_of(events: list[Turn]) -> list[Snapshot]:
    return [event for event in events if isinstance(event, Snapshot)]


def weights(snapshot: Snapshot) -> bytes:
    return (snapshot.folder / "adapter_model.safetensors").read_bytes()


def test_steps_slices_and_metrics(bench: Bench) -> None:
    events = list(bench.turns())
    steps = metrics_of(events)
    assert [row.step for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row.epoch for row in steps] == [1, 1, 1, 2, 2, 2]
    assert {row.total_steps for row in steps} == {6}
    assert [row.trained_tokens for row in steps] == [24, 24, 12] * 2
    assert steps[0].learning_rate == 0.0 < steps[1].learning_rate
    assert [row.train_loss for row in steps] == pytest.approx([2 / (1 + step) for step in range(6)])
    assert steps[0].train_mean_token_accuracy == pytest.approx(0.5)
    assert bench.engine.calls.count("optim a") == 6
    assert [event.input_tokens for event in events if isinstance(event, Forward)][:3] == [16, 16, 16]


def test_a_checkpoint_an_epoch_and_the_final_adapter(bench: Bench) -> None:
    snapshots = snapshots_of(list(bench.turns()))
    assert [(item.kind, item.step, item.epoch) for item in snapshots] == [
        (SnapshotKind.EPOCH, 3, 1),
        (SnapshotKind.EPOCH, 6, 2),
        (SnapshotKind.FINAL, 6, 2),
    ]
    assert "optimizer.safetensors" in snapshots[0].files
    assert "optimizer.safetensors" not in snapshots[2].files
    assert snapshots[2].trained_tokens == 120
    assert snapshots[0].metrics is not None
    assert snapshots[0].metrics.step == 3
    config = json.loads((snapshots[2].folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("baseModels/tiny", 4)


def test_a_resume_checkpoint_when_a_minute_has_passed(bench: Bench) -> None:
    events = []
    for event in bench.turns():
        events.append(event)
        if isinstance(event, StepMetrics):
            bench.clock.tick(35)
    kinds = [(item.kind, item.step) for item in snapshots_of(events)]
    assert kinds == [
        (SnapshotKind.RESUME, 2),
        (SnapshotKind.EPOCH, 3),
        (SnapshotKind.RESUME, 5),
        (SnapshotKind.EPOCH, 6),
        (SnapshotKind.FINAL, 6),
    ]


@pytest.mark.parametrize("stop_after", range(1, 18))
def test_stopped_anywhere_and_gone_on_the_result_is_the_same(bench: Bench, stop_after: int) -> None:
    whole = snapshots_of(list(bench.turns("whole")))[-1]
    first = bench.run("first")
    turns, last = served(first.turns(), bench.engine), None
    for _ in range(stop_after):
        event = next(turns)
        last = event if isinstance(event, Snapshot) else last
    last = first.snapshot() or last
    assert first.snapshot() is None
    turns.close()
    first.close()
    start = None
    if last is not None:
        start = Start(last.folder, last.step, last.trained_tokens, tuple(last.halvings.items()))
    second = bench.run("second", start=start)
    end = snapshots_of(list(served(second.turns(), bench.engine)))[-1]
    assert weights(end) == weights(whole)
    assert end.trained_tokens == whole.trained_tokens
    assert bench.engine.adapter_keys() == ("whole", "second")


def test_validation_one_batch_in_between_and_all_of_it_at_the_end_of_an_epoch(bench: Bench) -> None:
    steps = metrics_of(list(bench.turns(training=160, validation=10)))
    assert len(steps) == 80
    assert [row.step for row in steps if row.valid_loss is not None] == list(range(4, 81, 4))
    assert [row.step for row in steps if row.full_valid_loss is not None] == [40, 80]
    assert steps[39].valid_mean_token_accuracy == pytest.approx(0.5)
    assert not any(row.valid_loss for row in metrics_of(list(bench.turns("b"))))


def _no_room(limit: int) -> Callable[[Sequence[TrainSlice]], None]:
    def before(pieces: Sequence[TrainSlice]) -> None:
        if any(len(piece.rows) > limit for piece in pieces):
            raise MemoryError("no room")

    return before


def test_out_of_memory_halves_the_slices_and_a_replay_cuts_the_same(tmp_path: Path) -> None:
    small = Bench(tmp_path / "small", FakeEngine(_no_room(1)))
    snapshots = snapshots_of(list(small.turns()))
    assert snapshots[-1].halvings == dict.fromkeys(range(6), 1)
    # A bigger machine that knows the halvings computes the same.
    big = Bench(tmp_path / "big")
    start = Start(snapshots[0].folder, 3, 60, tuple((step, 1) for step in range(6)))
    assert weights(snapshots_of(list(big.turns(start=start)))[-1]) == weights(snapshots[-1])
    # So does one that repeats the job from its beginning.
    again = Bench(tmp_path / "again")
    events = list(again.turns(halvings=tuple(snapshots[-1].halvings.items())))
    assert (
        max(len(piece.rows) for event in events if isinstance(event, Forward) for piece in event.pieces) == 1
    )
    assert weights(snapshots_of(events)[-1]) == weights(snapshots[-1])


class FullDisk(FakeEngine):
    """An engine whose disk has no room for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False

    def save(self, *args: Any, **options: Any) -> tuple[str, ...]:
        if self.full:
            super().save(*args, **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().save(*args, **options)


def test_a_full_disk_makes_it_wait_at_an_epoch_and_skip_what_is_not_needed(tmp_path: Path) -> None:
    whole = snapshots_of(list(Bench(tmp_path / "whole").turns()))
    engine = FullDisk()
    bench = Bench(tmp_path / "full", engine)
    engine.full = True
    events: list[Turn] = []
    for event in bench.turns():
        events.append(event)
        if isinstance(event, StepMetrics):
            bench.clock.tick(35)
        if sum(isinstance(item, Blocked) for item in events) == 3:
            engine.full = False
    blocked = [index for index, event in enumerate(events) if isinstance(event, Blocked)]
    assert len(blocked) == 3
    # It trained on past the resume checkpoint of step 2, and waited for that of the epoch, of step 3.
    assert [item.step for item in metrics_of(events[: blocked[0]])] == [1, 2, 3]
    saved = snapshots_of(events)
    assert (saved[0].kind, saved[0].step) == (SnapshotKind.EPOCH, 3)
    assert weights(saved[-1]) == weights(whole[-1])
    # Nothing half-written is left.
    assert {path.parent for path in (tmp_path / "full").rglob("*.*")} == {item.folder for item in saved}


def test_a_row_that_never_fits_fails_the_job(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="8 tokens does not fit"):
        list(Bench(tmp_path, FakeEngine(_no_room(0))).turns())


class NoRoomToValidate(FakeEngine):
    limit = 0

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        _no_room(self.limit)(pieces)
        return super().evaluate(pieces)


def test_out_of_memory_in_a_validation_halves_its_slices(tmp_path: Path) -> None:
    engine = NoRoomToValidate()
    engine.limit = 1
    events = list(Bench(tmp_path, engine).turns(validation=4))
    seen = [metrics.full_valid_loss for metrics in metrics_of(events)]
    roomy = metrics_of(list(Bench(tmp_path / "roomy").turns(validation=4)))
    assert seen == [metrics.full_valid_loss for metrics in roomy]
    assert engine.calls.count("eval a") > len(roomy)


def _validated(events: Sequence[Turn]) -> list[int]:
    return [event.input_tokens for event in events if isinstance(event, Forward) and not event.training]


def test_the_slices_of_a_validation_are_recorded_and_stay_in_a_roomier_engine(tmp_path: Path) -> None:
    tight = NoRoomToValidate()
    tight.limit = 1
    events = list(Bench(tmp_path, tight).turns(validation=4))
    # It ran out of memory once; what is tried later is known to fit.
    assert [tokens for tokens in _validated(events) if tokens > 8] == [16]
    first = snapshots_of(events)[0]
    assert first.halvings == {-1: 1}
    roomy = Bench(tmp_path / "roomy")
    start = Start(first.folder, first.step, halvings=tuple(first.halvings.items()), state=first.state)
    assert set(_validated(list(roomy.turns("b", validation=4, start=start)))) == {8}
    assert set(_validated(list(roomy.turns("c", validation=4, halvings=((-1, 1),))))) == {8}


def _validated_by_step(events: Sequence[Turn]) -> list[list[int]]:
    """Rows of each validation pass, step by step."""
    steps: list[list[int]] = [[]]
    for event in events:
        if isinstance(event, Forward) and not event.training:
            steps[-1].append(len(event.rows))
        elif isinstance(event, StepMetrics):
            steps.append([])
    return steps[:-1]


def test_a_rerun_cuts_each_validation_as_it_was_cut(tmp_path: Path) -> None:
    config = replace(CONFIG, early_stopping_patience=9)  # every validation in full too
    engine = NoRoomToValidate()
    engine.limit = 2
    events: list[Turn] = []
    for event in Bench(tmp_path, engine).turns(validation=6, config=config):
        events.append(event)
        if len(metrics_of(events)) == 2 and len(_validated_by_step([*events, metrics_of(events)[0]])[2]) == 3:
            engine.limit = 1  # the batch has been validated in two passes, the whole file has not
    first = _validated_by_step(events)
    halvings = snapshots_of(events)[-1].halvings
    assert halvings == {-3: 1}
    roomy = list(
        Bench(tmp_path / "roomy").turns(validation=6, config=config, halvings=tuple(halvings.items()))
    )
    again = _validated_by_step(roomy)
    assert again == [first[0], first[1], [1] * len(again[2]), *first[3:]]
    assert (set(first[0]), again[2]) == ({2}, first[2][-len(again[2]) :])
    assert metrics_of(roomy) == metrics_of(events)


def test_a_validation_row_that_never_fits_fails_the_job(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="A row of 8 tokens does not fit"):
        list(Bench(tmp_path, NoRoomToValidate()).turns(validation=4))


class NoRoomForTokens(FakeEngine):
    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        if sum(len(row.tokens) for piece in pieces for row in piece.rows) > 16:
            raise MemoryError("no room")
        return super().evaluate(pieces)


def test_a_validation_row_that_never_fits_beside_shorter_ones_fails_the_job(tmp_path: Path) -> None:
    turns = Bench(tmp_path, NoRoomForTokens()).turns(validation=[*rows(3), *rows(1, 40)])
    with pytest.raises(FailedPrecondition, match="A row of 40 tokens does not fit"):
        for _ in range(100):
            next(turns)


def test_out_of_memory_in_a_score_halves_it_alone() -> None:
    job = Job(FakeEngine(), "a", TrainData(rows(4)), CONFIG, 32)  # type: ignore[arg-type]
    turns = job.score(rows(4), "")
    asked: list[list[int]] = []
    request = next(turns)
    with pytest.raises(StopIteration) as ended:
        while isinstance(request, Forward):
            (piece,) = request.pieces
            asked.append([row.line for row in piece.rows])
            request = (
                turns.send([_scored([-float(row.line) for row in piece.rows])])
                if len(piece.rows) < 3
                else turns.throw(MemoryError("no room"))
            )
    assert asked == [[1, 2, 3, 4], [1, 2], [3, 4]]
    assert ended.value.value == [1, 2, 3, 4]
    turns = job.score(rows(1), "")
    next(turns)
    with pytest.raises(FailedPrecondition, match="A row of 8 tokens does not fit"):
        turns.throw(MemoryError("no room"))


def _scored(losses: Sequence[float]) -> SliceResult:
    return SliceResult(sum(losses), len(losses), 0, len(losses), row_losses=tuple(losses))


def test_other_errors_pass_through(tmp_path: Path) -> None:
    def broken(pieces: Sequence[TrainSlice]) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        list(Bench(tmp_path, FakeEngine(broken)).turns())


class Losses(FakeEngine):
    """An engine whose rows have these losses a token in training (by step), and these in validation, in turn."""

    def __init__(
        self, training: Callable[[int, TrainRow], float], validation: Sequence[float] = (), norm: float = 1.0
    ) -> None:
        super().__init__()
        self.training, self.validation, self.norm = training, list(validation), norm
        self.step_index = 0

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        super().forward_backward(pieces)
        return [
            self._with(piece, [self.training(self.step_index, row) for row in piece.rows]) for piece in pieces
        ]

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        super().evaluate(pieces)
        loss = self.validation[min(self.step_index, len(self.validation)) - 1]
        return [self._with(piece, [loss] * len(piece.rows)) for piece in pieces]

    def optim_step(self, *arguments: Any, **options: Any) -> float:
        self.step_index += 1
        super().optim_step(*arguments, **options)
        return self.norm

    def _with(self, piece: TrainSlice, means: list[float]) -> SliceResult:
        counts = [trained_tokens(row) for row in piece.rows]
        losses = [mean * count for mean, count in zip(means, counts, strict=True)]
        assert isinstance(piece.objective, CrossEntropy)
        share = sum(losses) / piece.objective.batch_tokens
        return SliceResult(
            sum(losses), sum(counts), 0, piece.input_tokens, loss=share, row_losses=tuple(losses)
        )


def test_a_loss_that_is_no_number_fails_the_job_and_names_the_rows(tmp_path: Path) -> None:
    broken = {row + 1 for row in Bench(tmp_path).run().plan.step(4).rows[1:3]}
    bench = Bench(tmp_path, Losses(lambda step, row: math.nan if step == 4 and row.line in broken else 1.0))
    lines = ", ".join(str(row + 1) for row in bench.run().plan.step(4).rows if row + 1 in broken)
    with pytest.raises(
        FailedPrecondition, match=f"not a number any more at step 5 of 6; look at lines {lines} of"
    ):
        list(bench.turns())


def test_a_gradient_that_is_no_number_fails_the_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Losses(lambda step, row: float(row.line), norm=math.inf))
    worst = ", ".join(str(row + 1) for row in bench.run().plan.step(0).rows)
    with pytest.raises(
        FailedPrecondition, match=f"no finite gradient at step 1 of 6; look at lines {worst} of"
    ):
        list(bench.turns())


def test_a_loss_that_leaves_its_level_for_good_fails_the_job(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Losses(lambda step, row: 1.0 if step < 12 else 8.0))
    with pytest.raises(
        FailedPrecondition, match=r"diverged to 8 \(its lowest level was 1\) at step 22 of 40"
    ):
        list(bench.turns(training=80, config=replace(CONFIG, n_epochs=2)))


def test_it_stops_early_and_the_result_is_the_best(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 1.0, 1.2, 1.1, 1.3, 0.5, 0.4]
    config = replace(CONFIG, early_stopping_patience=3, eval_every=1, n_epochs=4)
    bench = Bench(tmp_path, Losses(lambda step, row: 1.0, losses))
    events = list(bench.turns(validation=4, config=config))
    assert [row.full_valid_loss for row in metrics_of(events)] == losses[:6]
    (note,) = [event for event in events if isinstance(event, Note)]
    assert (note.step, note.kind) == (6, "early_stopping")
    assert "after step 6 of 12" in note.message and "that of step 3" in note.message
    saved = snapshots_of(events)
    assert [(item.kind, item.step) for item in saved] == [
        (SnapshotKind.EPOCH, 3),
        (SnapshotKind.EPOCH, 6),
        (SnapshotKind.FINAL, 6),
    ]
    assert weights(saved[2]) == weights(saved[0]) != weights(saved[1])
    assert set(saved[2].files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (saved[1].folder / "best-adapter_model.safetensors").read_bytes() == weights(saved[0])
    assert not list(bench.folder.glob("a-best-[0-25-9]*"))


@pytest.mark.parametrize("stop_after", range(1, 40, 2))
def test_early_stopping_goes_on_where_it_was(tmp_path: Path, stop_after: int) -> None:
    losses = [3.0, 2.0, 1.0, 1.2, 1.1, 1.3, 0.5]
    config = replace(CONFIG, early_stopping_patience=3, eval_every=1, n_epochs=4)
    whole = Bench(tmp_path / "whole", Losses(lambda step, row: 1.0, losses))
    expected = list(whole.turns(validation=4, config=config))
    bench = Bench(tmp_path / "parts", Losses(lambda step, row: 1.0, losses))
    first = bench.run("a", validation=4, config=config)
    events, last = [], None
    for event, _ in zip(served(first.turns(), bench.engine), range(stop_after), strict=False):
        events.append(event)
        last = event if isinstance(event, Snapshot) else last
    last = first.snapshot() or last
    first.close()
    if last is not None and last.kind is SnapshotKind.FINAL:
        return
    start = None
    bench.engine.step_index = 0
    if last is not None:
        bench.engine.step_index = last.step
        start = Start(last.folder, last.step, last.trained_tokens, state=last.state)
    events += list(bench.turns("b", validation=4, config=config, start=start))
    assert weights(snapshots_of(events)[-1]) == weights(snapshots_of(expected)[-1])
    assert {row.step: row.full_valid_loss for row in metrics_of(events)} == dict(enumerate(losses[:6], 1))
    # Every epoch has its checkpoint, whichever attempt wrote it.
    epochs = {item.step for item in snapshots_of(events) if item.kind is SnapshotKind.EPOCH}
    assert epochs == {3, 6}


def test_data_that_cannot_be_trained(bench: Bench) -> None:
    with pytest.raises(InvalidArgument, match="no rows"):
        bench.run(training=0)
    run = bench.run()
    run = Run(
        SupervisedRecipe,
        engine=bench.engine,  # type: ignore[arg-type]
        key="a",
        data=TrainData([TrainRow([1, 2], [True, False])]),
        config=CONFIG,
        plan=PLAN,
        folder=lambda kind, step: bench.folder,
        clock=bench.clock,
    )
    with pytest.raises(InvalidArgument, match="No token"):
        list(served(run.turns(), bench.engine))


def test_a_checkpoint_whose_optimizer_is_of_another_step_is_refused(bench: Bench) -> None:
    first = snapshots_of(list(bench.turns()))[0]
    with pytest.raises(DataLoss):
        next(bench.turns("b", start=Start(first.folder, 2)))


def test_training_a_tuned_model_begins_with_its_weights(bench: Bench) -> None:
    final = snapshots_of(list(bench.turns()))[-1]
    run = bench.run("b", initial=final.folder)
    turns = served(run.turns(), bench.engine)
    next(turns)
    bench.engine.save("b", bench.folder / "seen", with_optimizer=True)
    assert (bench.folder / "seen" / "adapter_model.safetensors").read_bytes() == weights(final)
    assert (bench.folder / "seen" / "optimizer.safetensors").read_text() == "0"


def test_training_a_tuned_model_has_the_dropout_that_this_job_asks_for(bench: Bench) -> None:
    final = snapshots_of(list(bench.turns()))[-1]
    events = list(bench.turns("b", config=replace(CONFIG, lora_dropout=0.1), initial=final.folder))
    config = json.loads((snapshots_of(events)[-1].folder / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["r"]) == (0.1, 4)


def test_held_out_prompts_are_answered_at_each_checkpoint(bench: Bench) -> None:
    speech = Speech(lambda tokens: " ".join(map(str, tokens)), frozenset())
    config = replace(CONFIG, sample_prompts=2)
    events = list(bench.turns(validation=4, config=config, speech=speech))
    notes = [event for event in events if isinstance(event, Note)]
    assert [(note.step, note.data["line"], note.data["prompt"]) for note in notes] == [
        (3, "1", "0 0"), (3, "2", "1 1"), (6, "1", "0 0"), (6, "2", "1 1"),
    ]  # fmt: skip
    assert all(note.message.endswith(note.data["text"]) and note.kind == "generation" for note in notes)
    assert not bench.engine.open
    # It is only looked at: the weights are those of a run that shows nothing.
    quiet = Bench(bench.folder / "quiet")
    assert weights(snapshots_of(events)[-1]) == weights(snapshots_of(list(quiet.turns(validation=4)))[-1])


def test_a_prompt_that_cannot_be_answered_stops_no_training(bench: Bench) -> None:
    config = replace(CONFIG, sample_prompts=2)
    long = TrainRow([1] * 70, [False] * 69 + [True], line=8)
    run = Run(
        SupervisedRecipe,
        engine=bench.engine,  # type: ignore[arg-type]
        key="a",
        data=TrainData(rows(10), [long]),
        config=config,
        plan=PLAN,
        folder=lambda kind, step: bench.folder / f"{kind}-{step}",
        clock=bench.clock,
        speech=Speech(str, frozenset()),
    )
    events = list(served(run.turns(), bench.engine))
    said = [event.message for event in events if isinstance(event, Note)]
    assert said == ["The held-out prompts could not be answered: the prompt is too long."] * 2
    assert snapshots_of(events)[-1].kind is SnapshotKind.FINAL


def test_held_out_prompts_are_what_comes_before_the_first_target_each_once() -> None:
    made = [
        TrainRow([1, 2, 3, 4], [False, False, True, True], Role.CHOSEN, 1),
        TrainRow([1, 2, 5, 6], [False, False, True, True], Role.REJECTED, 1),
        TrainRow([7, 8], [True, True], Role.EXAMPLE, 2),
        TrainRow([1, 2, 9], [False, False, True], Role.CHOSEN, 3),
        TrainRow([4, 2, 9], [False, True, True], Role.CHOSEN, 4),
    ]
    assert [(item.line, item.tokens) for item in held_out(made, 8)] == [(1, (1, 2)), (4, (4,))]
    assert len(held_out(made, 1)) == 1
