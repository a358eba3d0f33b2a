"""Training and chat on one real (tiny) engine, turn by turn: counted in slices, not in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.model import (
    AttemptEvent,
    Ended,
    Note,
    Outcome,
    SlicePlan,
    Snapshot,
    SnapshotKind,
    TrainingConfig,
)
from lathe.engine.recipes.recipe import TrainData
from lathe.engine.recipes.run import Run
from lathe.engine.recipes.samples import Speech
from lathe.engine.recipes.sft import SupervisedRecipe
from lathe.engine.sampling import Sampled, SamplingParams
from tests.fakes.clock import FakeClock
from tests.fixtures.tiny_llama import build_tiny_llama


class CountingEngine(Engine):
    """Counts training slices."""

    slices = 0

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        self.slices += 1
        return super().forward_backward(pieces)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_llama(folder)
    return folder


def train(
    tiny: Path, folder: Path, *, prompts: tuple[int, ...] = (), samples: int = 0
) -> tuple[bytes, list[int], CountingEngine, list[AttemptEvent]]:
    """The final weights; for each token of the streams, how many slices went by since the one before.

    samples: how many held-out prompts are answered at each epoch's end.
    """
    engine = CountingEngine.load(tiny, dtype="float32", threads=1, kv_budget_bytes=1 << 24)
    assert isinstance(engine, CountingEngine)
    clock = FakeClock()
    loop = ModelLoop(engine, clock, LoopLimits(prefill_tokens=16))
    rows = [TrainRow([(row * 7 + place) % 400 for place in range(20)], [True] * 20) for row in range(16)]
    config = TrainingConfig(
        n_epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        seed=1,
        lora_r=4,
        target_modules=("q_proj", "down_proj"),
        sample_prompts=samples,
    )
    run = Run(
        SupervisedRecipe,
        engine=engine,
        key="train/a",
        data=TrainData(rows, [TrainRow([9, 8, 7, line], [False] * 3 + [True], line=line) for line in (1, 2)]),
        config=config,
        plan=SlicePlan(40, 1, "float32", "cpu"),
        folder=lambda kind, step: folder / f"{kind}-{step}",
        clock=clock,
        speech=Speech(lambda tokens: " ".join(map(str, tokens)), frozenset()),
    )
    events: list[AttemptEvent] = []
    loop.start("a", run, events.append)
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    streams = [loop.open("", list(range(1, length + 1)), greedy, lambda: None) for length in prompts]
    gaps, last = [], [0] * len(streams)
    while loop.run_once():
        for index, stream in enumerate(streams):
            for item in stream.take():
                if isinstance(item, Sampled):
                    gaps.append(engine.slices - last[index])
                    last[index] = engine.slices
    assert events[-1] == Ended(Outcome.SUCCEEDED, 8, 16 * 2 * 19)
    final = next(e for e in events if isinstance(e, Snapshot) and e.kind is SnapshotKind.FINAL)
    return (final.folder / "adapter_model.safetensors").read_bytes(), gaps, engine, events


def test_a_chat_beside_a_job_waits_for_one_slice_a_token_and_changes_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    alone, _, _, _ = train(tiny_folder, tmp_path / "alone")
    beside, gaps, engine, _ = train(tiny_folder, tmp_path / "beside", prompts=(5, 7))
    assert len(gaps) == 16
    assert max(gaps) <= 1
    assert engine.slices == 16
    assert beside == alone


def test_a_long_prompt_waits_for_one_slice_a_chunk(tiny_folder: Path, tmp_path: Path) -> None:
    _, gaps, _, _ = train(tiny_folder, tmp_path, prompts=(64,))
    assert gaps[0] <= 64 // 16
    assert max(gaps[1:]) <= 1


def test_the_answers_at_a_checkpoint_are_the_checkpoints_and_change_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    quiet, _, _, _ = train(tiny_folder, tmp_path / "quiet")
    asked, gaps, engine, events = train(tiny_folder, tmp_path / "asked", prompts=(5,), samples=1)
    assert asked == quiet
    assert max(gaps) <= 1
    notes = [event for event in events if isinstance(event, Note)]
    assert [note.step for note in notes] == [4, 8]
    for note in notes:
        engine.load_adapter(f"at {note.step}", tmp_path / "asked" / f"epoch-{note.step}")
        state = engine.open_sequence(
            f"at {note.step}", [9, 8, 7], SamplingParams(max_tokens=64, temperature=0.0)
        )
        while state.finished is None:
            engine.step([state])
        assert note.data == {"line": "1", "prompt": "9 8 7", "text": " ".join(map(str, state.tokens))}
