"""Attempts that share passes: who is joined, and who hears of what went wrong."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest

from lathe.common.errors import InvalidArgument, LatheError, ResourceExhausted
from lathe.common.metrics import Metrics
from lathe.engine.batch import CrossEntropy, TrainRow, TrainSlice
from lathe.engine.lora_config import LoraSpec
from lathe.engine.model import AttemptEvent, Ended, Outcome, Snapshot
from lathe.engine.recipes.turns import Turns, forward, generate
from lathe.engine.training import Trainer
from tests.fakes.clock import FakeClock
from tests.fakes.engine import FakeEngine


class Slices:
    """A run of slices of these token counts, of its own adapter."""

    def __init__(self, engine: FakeEngine, name: str, tokens: Sequence[int]) -> None:
        self.engine, self.name, self.tokens = engine, name, tokens
        self.step = self.trained_tokens = 0
        self.heard: list[Exception] = []

    def turns(self) -> Turns[None]:
        self.engine.create_adapter(self.name, LoraSpec(r=2), 1)
        for tokens in self.tokens:
            yield from self.one(tokens)

    def one(self, tokens: int) -> Turns[None]:
        piece = TrainSlice(self.name, (TrainRow([1] * tokens, [True] * tokens),), CrossEntropy(9))
        try:
            (result,) = yield from forward([piece])
        except (MemoryError, InvalidArgument) as error:
            self.heard.append(error)
        else:
            assert result.input_tokens == tokens
            self.step += 1

    def snapshot(self) -> Snapshot | None:
        return None

    def close(self) -> None:
        self.engine.drop_adapter(self.name)


class Bench:
    """A pass takes a second, and each of its slices a quarter of one for every ten tokens."""

    def __init__(self, fused_tokens: int = 100, slowdown: float = 9.0) -> None:
        self.engine, self.clock = FakeEngine(self.before), FakeClock()
        self.trainer = Trainer(
            self.engine,  # type: ignore[arg-type]
            self.clock,
            Metrics(),
            fused_tokens=fused_tokens,
            slowdown=slowdown,
        )
        self.events: dict[str, list[AttemptEvent]] = {}
        self.refuse: dict[str, Exception] = {}
        self.no_room_for = 10**9

    def before(self, pieces: Sequence[TrainSlice]) -> None:
        self.clock.tick(1 + sum(piece.input_tokens for piece in pieces) / 40)
        if sum(piece.input_tokens for piece in pieces) > self.no_room_for:
            raise MemoryError("no room")
        for piece in pieces:
            if piece.key in self.refuse:
                raise self.refuse[piece.key]

    def start(self, name: str, *tokens: int, run: type[Slices] = Slices) -> Slices:
        made = run(self.engine, name, tokens)
        self.events[name] = []
        self.trainer.start(name, made, self.events[name].append)
        return made

    def passes(self) -> list[str]:
        """The passes, to the end, by their adapters."""
        while self.trainer.turn():
            pass
        return [call.removeprefix("train ") for call in self.engine.calls if call.startswith("train")]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_small_slices_of_several_jobs_share_their_passes(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        bench.start(name, *[30] * 3)
    # Before any pass was measured nobody knows what joining costs the oldest.
    assert bench.passes() == ["a", "a b c", "a b c", "b c"]
    assert all(isinstance(events[-1], Ended) for events in bench.events.values())
    assert bench.engine.adapter_keys() == ()


def test_the_oldest_keeps_its_speed_whatever_the_others_bring() -> None:
    bench = Bench(fused_tokens=50, slowdown=1.6)
    bench.start("a", *[40] * 20)
    bench.start("b", *[45] * 20)
    bench.start("c", *[10] * 20)
    while not bench.events["a"]:
        bench.trainer.turn()
    alone = 20 * 2.0
    assert 1.4 * alone <= bench.clock.monotonic() <= 1.6 * alone
    names = " ".join(call for call in bench.engine.calls if call.startswith("train")).split()
    assert names.count("b") >= 4
    assert names.count("c") >= 4


def test_what_others_prepare_is_taken_from_their_time() -> None:
    bench = Bench(slowdown=1.6)

    class Prepares(Slices):
        def turns(self) -> Turns[None]:
            bench.clock.tick(10)
            yield from super().turns()

    bench.start("a", *[40] * 20)
    bench.start("b", *[40] * 20, run=Prepares)
    while not bench.events["a"]:
        bench.trainer.turn()
    assert bench.clock.monotonic() <= 1.6 * 20 * 2.0
    joined = [call for call in bench.engine.calls if call.startswith("train")].index("train a b")
    assert joined >= 10 / 0.6 / 2


def test_slices_that_do_not_fit_together_take_turns() -> None:
    bench = Bench(fused_tokens=50)
    for name in ("a", "b"):
        bench.start(name, *[40] * 6)
    passes = bench.passes()
    assert sorted(passes) == ["a"] * 6 + ["b"] * 6
    assert passes[:6].count("b") >= 2


def test_a_newcomer_begins_level_with_the_others(bench: Bench) -> None:
    bench.start("a", *[90] * 6)
    for _ in range(4):
        bench.trainer.turn()
    bench.start("b", *[90] * 6)
    passes = bench.passes()
    assert passes[:4] == ["a"] * 4
    assert set(passes[4:8]) == {"a", "b"}


def test_an_error_of_one_job_is_its_own(bench: Bench) -> None:
    runs = [bench.start(name, 20, 20) for name in ("a", "b", "c")]
    bench.refuse["b"] = InvalidArgument("row 0 of the slice is empty.")
    bench.passes()
    assert [run.step for run in runs] == [2, 0, 2]
    assert [len(run.heard) for run in runs] == [0, 2, 0]


def test_an_error_that_its_run_does_not_expect_ends_that_attempt_alone(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.start(name, 20, 20)
    bench.refuse["b"] = RuntimeError("the kernel is odd")
    bench.passes()
    ended = {name: events[-1] for name, events in bench.events.items()}
    assert [end.outcome for end in ended.values() if isinstance(end, Ended)] == [
        Outcome.SUCCEEDED,
        Outcome.RETRYABLE,
    ]


def test_out_of_memory_together_is_tried_alone_and_later_passes_are_smaller(bench: Bench) -> None:
    runs = [bench.start(name, *[30] * 4) for name in ("a", "b", "c")]
    bench.no_room_for = 60
    passes = bench.passes()
    assert [run.heard for run in runs] == [[], [], []]
    assert [run.step for run in runs] == [4, 4, 4]
    assert passes[:4] == ["a", "a", "b", "c"]
    assert max(len(one.split()) for one in passes) == 1


def test_the_room_of_joined_passes_grows_back_where_memory_was_short_for_a_moment(bench: Bench) -> None:
    for name in ("a", "b", "c"):
        bench.start(name, *[30] * 400)
    bench.no_room_for = 60
    for _ in range(20):
        bench.trainer.turn()
    short = sum(call.startswith("train") for call in bench.engine.calls)
    bench.no_room_for = 10**9
    bench.passes()
    joined = [len(call.split()) - 1 for call in bench.engine.calls if call.startswith("train")]
    assert max(joined[4:short]) == 1
    assert max(joined[short:]) == 3


def test_out_of_memory_alone_is_heard_by_the_run(bench: Bench) -> None:
    runs = [bench.start("a", 80), bench.start("b", 10)]
    bench.no_room_for = 50
    bench.passes()
    assert [len(run.heard) for run in runs] == [1, 0]


class Activations:
    """Something large that a pass holds while it runs."""


def test_what_a_failed_pass_held_is_free_when_the_next_one_runs() -> None:
    held: list[weakref.ref[Activations]] = []
    alive: dict[str, int] = {}

    class Hungry(Bench):
        def before(self, pieces: Sequence[TrainSlice]) -> None:
            alive[" ".join(piece.key for piece in pieces)] = sum(ref() is not None for ref in held)
            activations = Activations()
            held.append(weakref.ref(activations))
            if any(piece.key == "a" for piece in pieces):
                try:
                    raise RuntimeError("the device has no room")
                except RuntimeError as error:
                    raise MemoryError("no room") from error

    bench = Hungry()
    runs = [bench.start("b", 30, 30), bench.start("a", 30)]
    bench.passes()
    assert [len(run.heard) for run in runs] == [0, 1]
    assert alive == {"b": 0, "b a": 0, "a": 0}


class Asks(Slices):
    """Scores a row under the base, then samples twice, before it trains."""

    answers: tuple[object, ...] = ()

    def turns(self) -> Turns[None]:
        self.engine.create_adapter(self.name, LoraSpec(r=2), 1)
        row = TrainRow([1, 2, 3], [False, True, True])
        scores = yield from forward([TrainSlice("", (row,), CrossEntropy(1))], training=False)
        try:
            tokens = yield from generate(self.name, [[1, 2], [3]], 3, frozenset())
        except LatheError as error:
            tokens = [(str(error),)]
        self.answers = (scores, tokens)
        yield from self.one(10)


def test_what_a_run_asks_for_is_answered(bench: Bench) -> None:
    asks = bench.start("a", run=Asks)
    bench.start("b", *[30] * 3)
    for _ in range(9):
        bench.trainer.turn()
        states = bench.trainer.sequences
        bench.engine.step(states)  # type: ignore[arg-type]
    scores, tokens = asks.answers
    assert scores[0].tokens == 2  # type: ignore[index]
    assert [len(one) for one in tokens] == [3, 3]  # type: ignore[attr-defined]
    assert not bench.engine.open
    assert isinstance(bench.events["a"][-1], Ended)


def test_an_attempt_goes_on_in_the_turn_that_finds_its_answers_whole(bench: Bench) -> None:
    asks = bench.start("a", run=Asks)
    bench.trainer.turn()
    bench.trainer.turn()
    while bench.trainer.sequences:
        bench.engine.step(bench.trainer.sequences)  # type: ignore[arg-type]
    # The loop sleeps when a turn had nothing to do: this one must not say so.
    assert bench.trainer.turn()
    assert asks.answers


@pytest.mark.parametrize("error", [ResourceExhausted("no room for keys"), RuntimeError("no room for keys")])
def test_sampling_that_fails_is_heard_by_the_run(bench: Bench, error: Exception) -> None:
    asks = bench.start("a", run=Asks)
    bench.trainer.turn()
    bench.trainer.turn()
    assert bench.trainer.sequences
    bench.trainer.sampling_failed(error)
    bench.passes()
    (((told,),),) = asks.answers[1:]  # type: ignore[misc]
    assert told.endswith("no room for keys")
    ended = bench.events["a"][-1]
    assert isinstance(ended, Ended)
    assert ended.outcome is Outcome.SUCCEEDED
    assert not bench.engine.open


def test_an_attempt_that_ends_while_it_samples_gives_its_sequences_back(bench: Bench) -> None:
    bench.start("a", run=Asks)
    bench.trainer.turn()
    bench.trainer.turn()
    bench.trainer.end("a", Outcome.CANCELLED)
    assert not bench.engine.open
    assert bench.engine.adapter_keys() == ()
