"""Several adapters of one shape in batched products: the same numbers as one by one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, SliceResult, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.lora_batched import BatchRows, batch_rows
from lathe.engine.lora_config import LoraSpec
from lathe.engine.spec import DecoderSpec
from lathe.engine.weights import random_weights

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def rows_of(lengths: Sequence[int]) -> BatchRows | None:
    spans, start = [], 3
    for length in lengths:
        spans.append((start, start + length))
        start += length
    return batch_rows(spans, CPU)


@given(st.lists(st.integers(1, 160), min_size=2, max_size=5))
def test_rows_go_into_the_batch_and_back(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    if max(lengths) * len(lengths) > 1.25 * sum(lengths):
        assert rows is None
        return
    assert rows is not None
    total = 3 + sum(lengths)
    x = torch.arange(1.0, 2 * total + 1).view(total, 2)
    batch = rows.batch_zeroed(x.clone())
    assert batch.shape == (len(lengths), max(lengths), 2)
    for place, (start, stop) in enumerate(rows.spans):
        assert torch.equal(batch[place, : stop - start], x[start:stop])
        assert not batch[place, stop - start :].any()
    y = torch.zeros(total, 3)
    rows.add_product(y, slice(1, 3), batch, torch.eye(2).expand(len(lengths), 2, 2))
    assert torch.equal(y[3:, 1:], x[3:])
    assert not y[:3].any()
    assert not y[:, 0].any()


def test_what_does_not_pay_goes_one_by_one() -> None:
    assert rows_of([40]) is None
    assert rows_of([40, 161]) is None
    assert rows_of([40, 20]) is None
    assert batch_rows([(0, 10), (11, 21)], CPU) is None


def trained(lengths: Sequence[int], *, together: bool) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of a slice of each adapter's own, in one pass or each in its own."""
    spec = DecoderSpec.from_config(CONFIG)
    engine = Engine(Decoder(spec, random_weights(spec, device=CPU, dtype=torch.float64, std=0.2)))
    pieces = []
    for number, length in enumerate(lengths):
        key = str(number)
        engine.create_adapter(key, LoraSpec(r=3 if number < 3 else 5), seed=number)
        row = TrainRow([(7 * i * i + number) % 64 for i in range(length)], [i % 3 > 0 for i in range(length)])
        pieces.append(TrainSlice(key, (row,), CrossEntropy(length)))
        # B begins as zeros; a step on other rows makes it something.
        engine.forward_backward([TrainSlice(key, (TrainRow(row.tokens[::-1], row.mask),), CrossEntropy(1))])
        engine.optim_step(key, 1e-2)
    results: list[SliceResult] = []
    for some in [pieces] if together else [[piece] for piece in pieces]:
        results += engine.forward_backward(some)
    return [one.loss for one in results], [engine.gradients(piece.key).clone() for piece in pieces]


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([12, 12, 12], id="equal"),
        pytest.param([12, 10, 11], id="padded"),
        pytest.param([12, 4], id="too unequal"),
        pytest.param([12, 11, 12, 12], id="one of another rank"),
    ],
)
def test_a_pass_together_gives_the_numbers_of_passes_alone(lengths: list[int]) -> None:
    losses, gradients = trained(lengths, together=True)
    theirs, expected = trained(lengths, together=False)
    assert losses == pytest.approx(theirs, rel=1e-12)
    for ours, alone in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)
        assert ours.abs().max() > 1e-3
