from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from lathe.engine.batch import CrossEntropy, RowLoss, TrainRow, TrainSlice, trained_tokens
from lathe.engine.engine import Engine
from lathe.engine.lora_config import LoraSpec
from lathe.engine.sampling import SamplingParams
from lathe.engine.sequences import SequenceState
from tests.fixtures.turns import scores

MakeEngine = Callable[..., Engine]
ROWS = tuple(
    TrainRow([(7 * i + 3 * j * j) % 96 for j in range(6 + 5 * i)], [j >= 3 for j in range(6 + 5 * i)])
    for i in range(4)
)
GREEDY = SamplingParams(max_tokens=10, temperature=0)


def whole(key: str = "a", rows: tuple[TrainRow, ...] = ROWS) -> TrainSlice:
    return TrainSlice(key, rows, CrossEntropy(sum(trained_tokens(row) for row in rows)))


def train(engine: Engine, steps: int, lr: float = 0.02) -> None:
    batch = CrossEntropy(sum(trained_tokens(row) for row in ROWS))
    for _ in range(steps):
        engine.forward_backward([TrainSlice("a", ROWS[:2], batch)])
        engine.forward_backward([TrainSlice("a", ROWS[2:], batch)])
        engine.optim_step("a", lr)


def run(engine: Engine, states: list[SequenceState], **options: int) -> None:
    for _ in range(1000):
        if all(state.finished for state in states):
            break
        engine.step(states, **options)
    for state in states:
        engine.close_sequence(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    make_engine: MakeEngine, tmp_path: Path, dtype: torch.dtype
) -> None:
    straight = make_engine(dtype=dtype)
    straight.create_adapter("a", LoraSpec(r=4), seed=3)
    train(straight, 4)
    names = straight.save("a", tmp_path / "straight", with_optimizer=True, base_model="m")

    first = make_engine(dtype=dtype)
    first.create_adapter("a", LoraSpec(r=4), seed=3)
    train(first, 2)
    first.save("a", tmp_path / "half", with_optimizer=True)
    second = make_engine(dtype=dtype)
    assert second.restore("a", tmp_path / "half") == 2
    train(second, 2)
    second.save("a", tmp_path / "resumed", with_optimizer=True, base_model="m")
    for name in names:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_makes_nothing_that_stays(make_engine: MakeEngine, dtype: torch.dtype) -> None:
    engine = make_engine(dtype=dtype)
    engine.create_adapter("a", LoraSpec(r=4, target_modules=("all-linear", "lm_head")), seed=3)
    # What a pass took before the preflight of another process is then what it takes in this one.
    before = engine.memory().base_bytes
    train(engine, 1)
    assert engine.memory().base_bytes == before


def test_an_adapter_that_is_left_alone_does_not_carry_the_others(make_engine: MakeEngine) -> None:
    bank = make_engine()._bank
    for slot in range(4):
        bank.new_trainable(slot, LoraSpec(r=4, target_modules=("q_proj",)), seed=slot)

    def columns(*slots: int) -> int:
        plan = bank.plan(slots, [1] * len(slots), training=False).mixed
        assert plan is not None
        return max(group.a.out_features for group in plan.groups.values())

    assert [columns(0, 1, 2, 3), columns(0, 1), columns(2), columns(2, 3)] == [16, 16, 4, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_is_sampled_from_at_once(
    make_engine: MakeEngine, dtype: torch.dtype
) -> None:
    engine = make_engine(dtype=dtype)
    engine.create_adapter("a", LoraSpec(r=8), seed=0)
    before = engine.evaluate([whole()])[0]
    assert before.loss_sum == pytest.approx(engine.evaluate([whole("")])[0].loss_sum)
    train(engine, 40)
    after = engine.evaluate([whole()])[0]
    assert after.loss_sum < before.loss_sum / 10
    assert after.correct > 0.9 * after.tokens
    row = ROWS[3]
    state = engine.open_sequence("a", row.tokens[:8], GREEDY)
    run(engine, [state])
    assert state.tokens == row.tokens[8:18]


def test_slices_of_a_batch_add_up_to_the_batch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for key in ("one", "two"):
        engine.create_adapter(key, LoraSpec(r=2), seed=0)
    batch = CrossEntropy(sum(trained_tokens(row) for row in ROWS))
    engine.forward_backward([TrainSlice("one", ROWS, batch)])
    for row in ROWS:
        engine.forward_backward([TrainSlice("two", (row,), batch)])
    assert engine.optim_step("one", 0.1) == pytest.approx(engine.optim_step("two", 0.1), rel=1e-4)


def likelihood(sums: torch.Tensor, counts: torch.Tensor) -> RowLoss:
    """Cross entropy over 20 tokens, said as a function of the rows' sums."""
    return RowLoss(-sums.sum() / 20, {"tokens": float(counts.sum())})


def gradients_of(engine: Engine, key: str) -> torch.Tensor:
    gradients = engine._held[key].adapter.gradients
    assert gradients is not None
    return gradients.clone()


def test_a_loss_of_the_rows_sums_gives_the_gradients_of_cross_entropy(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for key in ("rows", "tokens"):
        engine.create_adapter(key, LoraSpec(r=2), seed=0)
    first, second = engine.forward_backward(
        [TrainSlice("rows", ROWS, likelihood), TrainSlice("tokens", ROWS, CrossEntropy(20))]
    )
    # A product may round its rows by their place in it.
    torch.testing.assert_close(
        gradients_of(engine, "rows"), gradients_of(engine, "tokens"), atol=1e-4, rtol=1e-4
    )
    assert first.loss == pytest.approx(second.loss)
    assert first.figures == {"tokens": sum(trained_tokens(row) for row in ROWS)}
    assert first.row_losses == pytest.approx(second.row_losses)


def test_a_score_is_the_sum_over_a_rows_trained_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=2), seed=0)
    train(engine, 2)
    for key in ("", "a"):
        for row, scored in zip(ROWS, scores(engine, key, ROWS), strict=True):
            logprobs = engine.logprobs(key, row.tokens)
            wanted = [value for value, trained in zip(logprobs, row.mask[1:], strict=True) if trained]
            assert scored == pytest.approx(sum(wanted), rel=1e-5)


@pytest.mark.parametrize("begun", [False, True])
def test_a_joined_pass_that_fails_half_way_leaves_the_gradients_as_they_were(
    make_engine: MakeEngine, begun: bool
) -> None:
    engine = make_engine()
    for key in ("a", "b"):
        engine.create_adapter(key, LoraSpec(r=2), seed=0)
        if begun:
            engine.forward_backward([whole(key)])
    before = [gradients_of(engine, key) for key in ("a", "b")]
    calls = []

    def fails_after_the_backward_pass(sums: torch.Tensor, counts: torch.Tensor) -> RowLoss:
        calls.append(gradients_of(engine, "a"))
        if len(calls) == 2:
            raise MemoryError("no room")
        return RowLoss(sums.sum())

    with pytest.raises(MemoryError):
        engine.forward_backward([whole("a"), TrainSlice("b", ROWS, fails_after_the_backward_pass)])
    assert not torch.equal(calls[1], before[0])
    assert torch.equal(gradients_of(engine, "a"), before[0])
    assert torch.equal(gradients_of(engine, "b"), before[1])


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (TrainRow([], []), "is empty"),
        (TrainRow([1, 2], [True]), "another length"),
        (TrainRow([1] * 129, [True] * 129), "longer than the context of 128"),
        (TrainRow([1, 96], [True] * 2), "outside the vocabulary of 96"),
    ],
)
def test_a_row_that_cannot_be_trained_is_named(make_engine: MakeEngine, row: TrainRow, word: str) -> None:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=2), seed=0)
    with pytest.raises(InvalidArgument, match=rf"row 1 of the slice \(line 7\).*{word}"):
        engine.forward_backward([whole(rows=(ROWS[0], replace(row, line=7)))])
    assert not gradients_of(engine, "a").any()


def test_torchs_attention_gives_the_same_step(make_engine: MakeEngine) -> None:
    norms = []
    for fused in (True, False):
        engine = make_engine(fused=fused)
        engine.create_adapter("a", LoraSpec(r=2), seed=0)
        result = engine.forward_backward([whole()])[0]
        norms.append((result.loss_sum, engine.optim_step("a", 0.1)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_slice_without_targets_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=2), seed=0)
    (result,) = engine.forward_backward(
        [TrainSlice("a", (TrainRow([1, 2], [True, False]),), CrossEntropy(5))]
    )
    assert (result.tokens, result.input_tokens, engine.optim_step("a", 0.1)) == (0, 2, 0.0)


def test_a_prefix_shared_by_prompts_of_one_batch_is_computed_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    shared = [(5 * i) % 96 for i in range(60)]
    prompts = [[*shared, i, i + 1] for i in range(4)]
    states = [engine.open_sequence("", prompt, GREEDY) for prompt in prompts]
    run(engine, states, prefill_tokens=24)
    assert [state.cached_tokens for state in states] == [0, 60, 60, 60]
    fresh = make_engine()
    for prompt, state in zip(prompts, states, strict=True):
        alone = fresh.open_sequence("", prompt, GREEDY)
        run(fresh, [alone])
        assert alone.tokens == state.tokens


def test_what_a_step_of_training_made_stale_is_not_reused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=4), seed=0)
    prompt = list(range(20))
    for expected in (0, 19):
        state = engine.open_sequence("a", prompt, GREEDY)
        run(engine, [state])
        assert state.cached_tokens == expected
    train(engine, 1)
    state = engine.open_sequence("a", prompt, GREEDY)
    run(engine, [state])
    assert state.cached_tokens == 0


def test_sequences_beyond_the_cache_wait_and_give_the_same_tokens(make_engine: MakeEngine) -> None:
    prompts = [[(i * j) % 96 for j in range(1, 31)] for i in range(1, 6)]
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=5)
    # In float64, where no draw lies so near to another token that a pass of another shape could round it there.
    small, large = make_engine(dtype=torch.float64, kv_tokens=150), make_engine(dtype=torch.float64)
    some = [small.open_sequence("", prompt, params) for prompt in prompts]
    run(small, some)
    all_at_once = [large.open_sequence("", prompt, params) for prompt in prompts]
    run(large, all_at_once)
    assert [state.tokens for state in some] == [state.tokens for state in all_at_once]
    assert small.memory().kv_bytes <= small.memory().kv_budget_bytes


def test_a_prompt_the_cache_can_never_hold_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_tokens=20)
    with pytest.raises(ResourceExhausted):
        engine.step([engine.open_sequence("", list(range(30)), GREEDY)])


def test_a_stop_id_ends_a_sequence_and_the_context_bounds_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = engine.open_sequence("", [1, 2, 3], GREEDY)
    run(engine, [free])
    stop = free.tokens[4]
    state = engine.open_sequence("", [1, 2, 3], SamplingParams(temperature=0, stop_ids=frozenset({stop})))
    run(engine, [state])
    assert (state.finished, state.tokens) == ("stop", free.tokens[: free.tokens.index(stop) + 1])
    long = engine.open_sequence("", [5] * 120, SamplingParams(temperature=0))
    run(engine, [long])
    assert (long.finished, len(long.tokens)) == ("length", 8)
    with pytest.raises(InvalidArgument, match="context of 128"):
        engine.open_sequence("", [5] * 128, GREEDY)


def test_wrong_calls(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    engine.create_adapter("a", LoraSpec(r=2), seed=0)
    engine.save("a", tmp_path, with_optimizer=False)
    engine.load_adapter("frozen", tmp_path)
    with pytest.raises(AlreadyExists):
        engine.create_adapter("a", LoraSpec(), seed=0)
    with pytest.raises(NotFound):
        engine.forward_backward([whole("b")])
    with pytest.raises(FailedPrecondition, match="sampling only"):
        engine.forward_backward([whole("frozen")])
    with pytest.raises(InvalidArgument, match="vocabulary"):
        engine.open_sequence("", [96], GREEDY)
    state = engine.open_sequence("a", [1], GREEDY)
    with pytest.raises(FailedPrecondition, match="in use"):
        engine.drop_adapter("a")
    engine.close_sequence(state)
    engine.close_sequence(state)
    engine.drop_adapter("a")
    assert engine.adapter_keys() == ("frozen",)
    with pytest.raises(InvalidArgument, match=r"optimizer\.safetensors"):
        engine.restore("a", tmp_path)


def test_an_adapter_without_room_for_its_optimizer_leaves_nothing(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for the moments")

    engine = make_engine()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("lathe.engine.engine.AdamW", no_room)
        engine.create_adapter("a", LoraSpec(r=4), seed=1)
    assert engine.adapter_keys() == ()
    assert engine._bank.free_slot() == 0
    engine.create_adapter("a", LoraSpec(r=4), seed=1)
