"""What fits is measured, remembered, planned smaller or refused with a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import FailedPrecondition
from lathe.engine.batch import TrainRow
from lathe.engine.memory import Load, Measurement, MemoryBook, bound, free_bytes, peak_bytes
from lathe.engine.model import Note, SlicePlan, Snapshot, SnapshotKind, TrainingConfig
from lathe.engine.packing import slice_plan
from lathe.engine.recipes.preflight import PADDING, Memory, estimated, heaviest, load_of
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.sft import SupervisedRecipe
from lathe.engine.recipes.turns import Forward, Turn
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine
from tests.fixtures.turns import served

CONFIG = TrainingConfig(
    n_epochs=1, batch_size=8, learning_rate=1e-3, seed=3, lora_r=4, target_modules=("q_proj",)
)


def row(length: int, line: int = 0) -> TrainRow:
    return TrainRow([line % 500] * length, [False] + [True] * (length - 1), line=line)


@dataclass
class Surroundings:
    """Memory with so much free, and a book."""

    free: int | None
    book: list[Measurement] = field(default_factory=list)

    def memory(self) -> Memory:
        return Memory(lambda: self.free, lambda: self.book, self.book.append)


def turns(
    folder: Path,
    around: Surroundings,
    rows: list[TrainRow],
    engine: FakeEngine | None = None,
    tokens: int = 64,
) -> list[Turn]:
    engine = engine or FakeEngine()
    run = Run(
        SupervisedRecipe,
        engine=engine,  # type: ignore[arg-type]
        key="a",
        data=TrainData(rows),
        config=CONFIG,
        plan=SlicePlan(tokens, 1, "float32", "cpu"),
        folder=lambda kind, step: folder / f"{kind}-{step}",
        clock=FakeClock(),
        memory=around.memory(),
    )
    return list(served(run.turns(), engine))


def slices(events: list[Turn]) -> list[int]:
    return [event.input_tokens for event in events if isinstance(event, Forward)]


def notes(events: list[Turn]) -> list[str]:
    return [event.message for event in events if isinstance(event, Note) and event.kind != "memory"]


ROWS = [row(length, line) for line, length in enumerate([8, 16, 16, 8, 30, 8, 8, 16], 1)]


def test_the_heaviest_slice_is_measured_after_an_eighth_of_it(tmp_path: Path) -> None:
    engine, around = FakeEngine(), Surroundings(10_000_000)
    plain = turns(tmp_path, Surroundings(None), ROWS)
    events = turns(tmp_path, around, ROWS, engine)
    measured = [call for call in engine.calls if call.startswith("measure")]
    assert measured == ["measure a 7", "measure a 62"]
    assert slices(events) == slices(plain) and not notes(events)
    assert around.book[-1] == Measurement(Load(62, 30, 59, 90), 62_000)
    told = [event.data for event in events if isinstance(event, Note)]
    assert told == [{"bytes": "62000", "tokens": "62"}]
    assert not [event for event in plain if isinstance(event, Note)]


def test_what_was_measured_before_is_not_measured_again(tmp_path: Path) -> None:
    engine, around = FakeEngine(), Surroundings(10_000_000)
    turns(tmp_path / "1", around, ROWS)
    turns(tmp_path / "2", around, ROWS[:4], engine)
    assert not [call for call in engine.calls if call.startswith("measure")]


def test_what_does_not_fit_is_computed_in_smaller_slices_of_the_same_batch(tmp_path: Path) -> None:
    around = Surroundings(50_000)
    events = turns(tmp_path, around, ROWS)
    assert max(slices(events)) <= 32 and sum(slices(events)) == sum(
        slices(turns(tmp_path, Surroundings(None), ROWS))
    )
    (note,) = notes(events)
    assert "slices of at most 31 tokens" in note and "The batch stays the same" in note
    # What would have been too much was never tried.
    assert max(item.load.tokens for item in around.book) <= 32


def test_the_halvings_are_recorded_for_a_replay(tmp_path: Path) -> None:
    around, engine = Surroundings(50_000), FakeEngine()
    run = Run(
        SupervisedRecipe,
        engine=engine,  # type: ignore[arg-type]
        key="a",
        data=TrainData(ROWS),
        config=CONFIG,
        plan=SlicePlan(64, 1, "float32", "cpu"),
        folder=lambda kind, step: tmp_path / f"{kind}-{step}",
        clock=FakeClock(),
        memory=around.memory(),
    )
    final = [
        event for event in served(run.turns(), engine) if getattr(event, "kind", None) is SnapshotKind.FINAL
    ]
    assert final[0].halvings == {0: 2}  # type: ignore[union-attr]


def test_a_validation_has_no_more_room_and_its_halvings_are_recorded_too(tmp_path: Path) -> None:
    around, engine = Surroundings(50_000), FakeEngine()
    run = Run(
        SupervisedRecipe,
        engine=engine,  # type: ignore[arg-type]
        key="a",
        data=TrainData(ROWS, ROWS),
        config=CONFIG,
        plan=SlicePlan(64, 1, "float32", "cpu"),
        folder=lambda kind, step: tmp_path / f"{kind}-{step}",
        clock=FakeClock(),
        memory=around.memory(),
    )
    events = list(served(run.turns(), engine))
    validated = [event for event in events if isinstance(event, Forward) and not event.training]
    assert max(event.input_tokens for event in validated) <= 31
    assert all(event.halvings == {0: 2, -1: 2} for event in events if isinstance(event, Snapshot))


def test_that_a_heavier_slice_does_not_fit_says_nothing_of_a_lighter_one(tmp_path: Path) -> None:
    rows = [row(30, line) for line in range(1, 9)]
    around = Surroundings(10_000_000)
    assert max(slices(turns(tmp_path / "1", around, rows))) == 60
    around.free = 50_000
    events = turns(tmp_path / "2", around, rows)
    assert max(slices(events)) == 30 and len(notes(events)) == 1


def test_a_slice_that_takes_more_than_its_trial_promised_is_halved(tmp_path: Path) -> None:
    class Superlinear(FakeEngine):
        def measure(self, key: str, rows: Any) -> int | None:
            tokens = sum(len(item.tokens) for item in rows)
            return 1000 * tokens if tokens < 60 else 1200 * tokens

    rows = [row(30, line) for line in range(1, 9)]
    events = turns(tmp_path, Surroundings(70_000), rows, Superlinear())
    assert max(slices(events)) == 30 and len(notes(events)) == 1


def test_a_row_that_cannot_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        turns(tmp_path, Surroundings(20_000_000), [row(50, 7)], _thirsty(1_000_000))
    assert refused.value.reason == "OUT_OF_MEMORY"
    assert refused.value.message == (
        "A row of 50 tokens (line 7) needs about 0.05 GB of memory, and 0.02 GB are free on this engine: shorten it to "
        "about 18 tokens, or use a bigger machine."
    )


def _thirsty(bytes_per_token: int) -> FakeEngine:
    engine = FakeEngine()
    engine.bytes_per_token = bytes_per_token
    return engine


def test_running_out_while_measuring_is_an_answer_too(tmp_path: Path) -> None:
    class Small(FakeEngine):
        def measure(self, key: str, rows: Any) -> int | None:
            if sum(len(item.tokens) for item in rows) > 40:
                raise MemoryError("no room")
            return super().measure(key, rows)

    events = turns(tmp_path, Surroundings(10_000_000), ROWS, Small())
    assert max(slices(events)) <= 32 and len(notes(events)) == 1


@pytest.mark.parametrize("free", [None, 10_000_000])
def test_where_nothing_can_be_measured_the_plan_stays(tmp_path: Path, free: int | None) -> None:
    class Blind(FakeEngine):
        def measure(self, key: str, rows: Any) -> int | None:
            return None

    assert slices(turns(tmp_path, Surroundings(free), ROWS, Blind()))[0] > 32


def test_two_trials_find_the_part_that_does_not_grow() -> None:
    def trial(tokens: int, taken: int) -> Measurement:
        return Measurement(Load(tokens, tokens, tokens, tokens), taken)

    assert estimated([trial(8, 900)], 64) == 7200
    assert estimated([trial(8, 900), trial(16, 1000)], 64) == 1600


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    unit=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 4),
    budget=st.integers(1, 100),
    seed=st.integers(0, 3),
)
def test_no_slice_of_the_plan_is_much_heavier(
    lengths: list[int], unit: int, batch_size: int, budget: int, seed: int
) -> None:
    rows = [row(length) for length in lengths for _ in range(unit)]
    slices = heaviest(rows, unit=unit, batch_size=batch_size, max_tokens=budget)
    loads = [load_of(one) for one in slices]
    plan = slice_plan(
        [len(item.tokens) for item in rows],
        n_epochs=1,
        batch_size=batch_size,
        seed=seed,
        max_tokens_per_slice=budget,
        unit=unit,
    )
    shortest = min(lengths) * unit
    for index in range(plan.total_steps):
        for piece in plan.step(index).slices:
            other = load_of([rows[place] for place in piece.rows])
            assert other.longest <= max(load.longest for load in loads)
            assert other.padded <= PADDING * max(load.padded for load in loads)
            assert other.tokens <= loads[0].tokens + max(lengths) * unit - shortest


def test_a_long_row_beside_many_short_ones_is_measured_too(tmp_path: Path) -> None:
    """Attention makes each as long as the longest."""

    class Padding(FakeEngine):
        def measure(self, key: str, rows: Any) -> int | None:
            return load_of(rows).padded * self.bytes_per_token

    rows = [row(length) for length in [32, 31] + [2] * 40]
    most, padded = heaviest(rows, unit=1, batch_size=64, max_tokens=64)
    assert [len(item.tokens) for item in most] == [32, 31]
    assert [len(item.tokens) for item in padded] == [32] + [2] * 16
    around = Surroundings(200_000)
    events = turns(tmp_path, around, rows, Padding())
    assert [item.load.padded for item in around.book] == [8, 64, 32, 256]
    assert len(notes(events)) == 1 and max(slices(events)) <= 32


def test_a_bound_covers_what_is_lighter() -> None:
    known = [Measurement(Load(100, 50, 80, 150), 7), Measurement(Load(60, 50, 40, 100), 5)]
    assert bound(known, Load(60, 10, 40, 100)) == 5
    assert bound(known, Load(60, 10, 41, 100)) == 7
    assert bound(known, Load(60, 10, 40, 101)) == 7
    assert bound(known, Load(60, 51, 1, 60)) is None


def test_a_book_outlives_its_process_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "memory.jsonl"
    first, second = Measurement(Load(1, 2, 3, 4), 4), Measurement(Load(5, 6, 7, 8), 8)
    assert MemoryBook(path).known("a") == []
    MemoryBook(path).learn("a", first)
    with path.open("ab") as file:
        file.write(b'{"profile": "a", "tok\n')
    MemoryBook(path).learn("b", first)
    MemoryBook(path).learn("a", second)
    assert MemoryBook(path).known("a") == [first, second]
    MemoryBook(Path("/proc/nowhere/memory.jsonl")).learn("a", first)


CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1 << 20, 24 << 20, 200 << 20])
def test_a_peak_is_what_was_held_at_once(size: int) -> None:
    def work() -> None:
        torch.ones(size // 4, dtype=torch.float32)

    def measured(work: Callable[[], None]) -> int:
        taken = peak_bytes(CPU, work)
        assert taken is not None
        return taken

    measured(work)
    assert measured(work) == pytest.approx(size, rel=0.1, abs=2 << 20)
    assert measured(lambda: None) < 2 << 20


def test_something_is_free() -> None:
    free = free_bytes(CPU)
    assert free is not None and free > 0
