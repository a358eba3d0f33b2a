"""The model loop, turn by turn, without threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lathe.common.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    NotFound,
    ResourceExhausted,
)
from lathe.common.metrics import Metrics
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.loop import LoopLimits, ModelLoop
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import AttemptEvent, Ended, Outcome, Snapshot
from lathe.engine.recipes.turns import Blocked, Generate, Turns, forward
from lathe.engine.sampling import Sampled, SamplingParams
from lathe.engine.streams import StreamFinished, StreamStarted, TokenStream
from lathe.engine.training import Trainer
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine


class Slices:
    """A run of n equal slices of its own adapter."""

    def __init__(
        self, engine: FakeEngine, name: str, n: int, error: Exception | None = None, tokens: int = 10
    ) -> None:
        self.engine, self.name, self._n, self._error, self._tokens = engine, name, n, error, tokens
        self.step = self.trained_tokens = 0
        self.closed = False

    def turns(self) -> Turns[None]:
        if self.name not in self.engine.adapter_keys():
            self.engine.create_adapter(self.name, LoraSpec(r=2), 1)
        row = TrainRow([1] * self._tokens, [True] * self._tokens)
        for _ in range(self._n):
            yield from forward([TrainSlice(self.name, (row,), CrossEntropy(9))])
            self.step += 1
        if self._error is not None:
            raise self._error

    def snapshot(self) -> Snapshot | None:
        return None

    def close(self) -> None:
        self.closed = True


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def loop(engine: FakeEngine, clock: FakeClock) -> ModelLoop:
    return ModelLoop(engine, clock, LoopLimits(max_sequences=2, max_waiting=1, stream_tokens=4))  # type: ignore[arg-type]


def opened(loop: ModelLoop, tokens: int, key: str = "") -> TokenStream:
    return loop.open(key, [1, 2, 3], greedy(tokens), lambda: None)


def test_a_sequence_comes_out_token_by_token_and_frees_itself(loop: ModelLoop, engine: FakeEngine) -> None:
    stream = opened(loop, 2)
    assert loop.run_once()
    first = stream.take()
    assert first[0] == StreamStarted(0)
    assert isinstance(first[1], Sampled)
    loop.run_once()
    assert stream.take()[1:] == [StreamFinished("length")]
    assert not engine.open
    assert not loop.run_once()
    assert loop.open_sequences == 0


def test_training_and_sampling_take_turns(loop: ModelLoop, engine: FakeEngine) -> None:
    loop.start("att-1", Slices(engine, "a", 6), lambda event: None)
    opened(loop, 3)
    while loop.run_once():
        pass
    assert engine.calls == ["sample 1", "train a"] * 3 + ["train a"] * 3


def test_samplings_share_is_a_setting(engine: FakeEngine, clock: FakeClock) -> None:
    loop = ModelLoop(engine, clock, LoopLimits(decode_steps=3))  # type: ignore[arg-type]
    loop.start("att-1", Slices(engine, "a", 4), lambda event: None)
    opened(loop, 7)
    while loop.run_once():
        pass
    assert engine.calls == [
        *["sample 1"] * 3,
        "train a",
        *["sample 1"] * 3,
        "train a",
        "sample 1",
        *["train a"] * 2,
    ]


class Asking(Slices):
    """A run that wants answers to prompts."""

    def turns(self) -> Turns[None]:
        self.answers = yield Generate("", ((1, 2, 3), (4, 5, 6)), 2)


def test_a_jobs_own_prompts_are_not_starved_by_streams(engine: FakeEngine, clock: FakeClock) -> None:
    loop = ModelLoop(engine, clock, LoopLimits(prefill_tokens=4))  # type: ignore[arg-type]
    events: list[AttemptEvent] = []
    asking = Asking(engine, "a", 0)
    loop.start("att-1", asking, events.append)
    for _ in range(20):
        # There is always a stream whose prompt would take all the room.
        loop.open("", [1] * 8, greedy(1), lambda: None)
        loop.run_once()
    assert [event.outcome for event in events if isinstance(event, Ended)] == [Outcome.SUCCEEDED]
    assert [len(tokens) for tokens in asking.answers] == [2, 2]


def test_a_full_stream_suspends_its_sequence_alone_and_cancels_it_after_30_seconds(
    loop: ModelLoop, clock: FakeClock, engine: FakeEngine
) -> None:
    slow, quick = opened(loop, 20), opened(loop, 20)
    got = 0
    for _ in range(10):
        loop.run_once()
        got += sum(isinstance(item, Sampled) for item in quick.take())
    assert got == 10
    assert len(slow.take()) == 4
    for _ in range(6):
        loop.run_once()
        quick.take()
    assert not slow.has_room()
    clock.tick(31)
    loop.run_once()
    items = slow.take()
    assert isinstance(items[-1], ResourceExhausted)
    assert len(engine.open) == 1


def test_a_reader_that_makes_room_wakes_its_sequence(loop: ModelLoop, clock: FakeClock) -> None:
    stream = opened(loop, 6)
    tokens = 0
    for _ in range(6):
        loop.run_once()
    clock.tick(29)
    tokens += sum(isinstance(item, Sampled) for item in stream.take())
    clock.tick(29)
    while loop.run_once():
        items = stream.take()
        tokens += sum(isinstance(item, Sampled) for item in items)
    assert tokens == 6


def test_more_than_max_sequences_wait_and_more_than_max_waiting_are_refused(loop: ModelLoop) -> None:
    streams = [opened(loop, 1) for _ in range(3)]
    with pytest.raises(ResourceExhausted):
        opened(loop, 1)
    loop.run_once()
    assert [len(stream.take()) for stream in streams] == [3, 3, 0]
    loop.run_once()
    assert len(streams[2].take()) == 3
    opened(loop, 1)


def test_a_cancelled_sequence_is_freed_whether_it_runs_or_waits(loop: ModelLoop, engine: FakeEngine) -> None:
    streams = [opened(loop, 20) for _ in range(3)]
    loop.run_once()
    for stream in (streams[0], streams[2]):
        loop.cancel(stream)
    loop.cancel(streams[0])
    loop.run_once()
    assert len(engine.open) == 1
    assert loop.open_sequences == 1


@pytest.mark.parametrize(("key", "prompt", "error"), [("nobody", [1], NotFound), ("", [], InvalidArgument)])
def test_a_sequence_that_cannot_be_opened_ends_with_the_reason(
    loop: ModelLoop, key: str, prompt: list[int], error: type[LatheError]
) -> None:
    stream = loop.open(key, prompt, greedy(1), lambda: None)
    loop.run_once()
    (item,) = stream.take()
    assert isinstance(item, error)
    assert loop.open_sequences == 0


def test_a_sequence_that_gets_no_number_ends_alone_with_the_reason(
    engine: FakeEngine, clock: FakeClock
) -> None:
    metrics = Metrics()
    loop = ModelLoop(engine, clock, LoopLimits(), metrics)  # type: ignore[arg-type]
    engine.create_adapter("huge", LoraSpec(r=2), 1)
    engine.overflows.add("huge")
    failing, other = opened(loop, 2, "huge"), opened(loop, 2)
    while loop.run_once():
        pass
    (error,) = failing.take()
    assert isinstance(error, LatheError) and error.reason == "MODEL_NOT_FINITE"
    assert other.take()[-1] == StreamFinished("length")
    assert not engine.open and loop.open_sequences == 0
    assert metrics.registry.get_sample_value("lathe_engine_failed_sequences_total") == 1


def test_held_out_prompts_that_get_no_number_tell_the_attempt(engine: FakeEngine, clock: FakeClock) -> None:
    loop = ModelLoop(engine, clock, LoopLimits())  # type: ignore[arg-type]
    engine.overflows.add("")
    events: list[AttemptEvent] = []
    loop.start("att-1", Asking(engine, "a", 0), events.append)
    while loop.run_once():
        pass
    (ended,) = events
    assert isinstance(ended, Ended) and ended.error is not None
    assert "not finite" in ended.error.message
    assert not engine.open


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.SUCCEEDED),
        (InvalidArgument("a row is wrong"), Outcome.FAILED),
        (FailedPrecondition("it diverged"), Outcome.FAILED),
        (RuntimeError("the disk is odd"), Outcome.RETRYABLE),
    ],
)
def test_how_an_attempt_ends(
    loop: ModelLoop, engine: FakeEngine, error: Exception | None, outcome: Outcome
) -> None:
    recipe, events = Slices(engine, "a", 2, error), list[AttemptEvent]()
    loop.start("a", recipe, events.append)
    while loop.run_once():
        pass
    (ended,) = events
    assert isinstance(ended, Ended)
    assert (ended.outcome, ended.step, recipe.closed) == (outcome, 2, True)
    assert (ended.error is None) == (error is None)


def test_a_broken_attempt_leaves_streams_alone(loop: ModelLoop, engine: FakeEngine) -> None:
    loop.start("a", Slices(engine, "a", 0, RuntimeError("boom")), lambda event: None)
    stream = opened(loop, 1)
    loop.run_once()
    assert stream.take()[-1] == StreamFinished("length")


def test_a_suspended_attempt_stops_at_the_next_slice_and_goes_on_when_told(
    loop: ModelLoop, engine: FakeEngine
) -> None:
    loop.start("a", Slices(engine, "a", 5), lambda event: None)
    loop.run_once()
    loop.suspend_attempt("a", True)
    assert not loop.run_once()
    loop.suspend_attempt("a", False)
    loop.run_once()
    assert len(engine.calls) == 2


class Waits(Slices):
    """A recipe that has to wait before its second slice."""

    def turns(self) -> Turns[None]:
        yield from super().turns()
        yield Blocked(5.0, "The disk is full.")
        yield from super().turns()


def test_a_blocked_attempt_is_let_alone_and_tried_again(
    loop: ModelLoop, engine: FakeEngine, clock: FakeClock
) -> None:
    events: list[AttemptEvent] = []
    loop.start("att-1", Waits(engine, "waits", 1), events.append)
    while loop.run_once():
        pass
    loop.start("att-2", Slices(engine, "other", 1), events.append)
    assert loop.run_once()
    assert engine.calls == ["train waits", "train other"]
    clock.tick(5)
    while loop.run_once():
        pass
    assert engine.calls == ["train waits", "train other", "train waits"]
    assert [event.outcome for event in events if isinstance(event, Ended)] == [Outcome.SUCCEEDED] * 2


def test_an_attempt_whose_wait_ends_while_the_loop_falls_asleep_is_not_forgotten(
    engine: FakeEngine, clock: FakeClock
) -> None:
    trainer = Trainer(engine, clock, Metrics(), fused_tokens=100, slowdown=1.6)  # type: ignore[arg-type]
    trainer.start("att-1", Waits(engine, "waits", 1), lambda event: None)
    while trainer.turn():
        pass
    clock.tick(5)
    assert trainer.blocked
    while trainer.turn():
        pass
    assert not trainer.blocked


def test_cancel_and_drop(loop: ModelLoop, engine: FakeEngine) -> None:
    events: list[AttemptEvent] = []
    recipes = [Slices(engine, name, 9) for name in ("a", "b")]
    for name, recipe in zip(("a", "b"), recipes, strict=True):
        loop.start(name, recipe, events.append)
    loop.run_once()
    loop.cancel_attempt("a")
    loop.drop_attempt("b")
    assert not loop.run_once()
    assert events == [Ended(Outcome.CANCELLED, 0)]
    assert all(recipe.closed for recipe in recipes)


def test_adapters_are_loaded_and_dropped_between_turns(
    loop: ModelLoop, engine: FakeEngine, tmp_path: Path
) -> None:
    engine.create_adapter("source", LoraSpec(r=2), 1)
    engine.save("source", tmp_path, with_optimizer=False)
    loaded = [loop.load_adapter("a", tmp_path), loop.load_adapter("a", tmp_path)]
    loop.run_once()
    assert [future.exception(0) for future in loaded] == [None, None]
    opened(loop, 9, "a")
    loop.run_once()
    dropped = loop.drop_adapter("a")
    loop.run_once()
    assert isinstance(dropped.exception(0), FailedPrecondition)


def test_stop_ends_open_sequences(loop: ModelLoop) -> None:
    stream = opened(loop, 50)
    loop.run_once()
    stream.take()
    loop.stop()
    loop.run()
    assert isinstance(stream.take()[-1], Aborted)
