from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lathe.common.errors import InvalidArgument
from lathe.engine.sampling import Sampler, SamplingParams, nucleus, sample_batch

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def draws(n: int = 4000, logits: torch.Tensor = LOGITS, **settings: Any) -> list[int]:
    sampler = Sampler(SamplingParams(**{"seed": 1, **settings}), logits.numel())
    return [sampler.choose(logits.clone()).token for _ in range(n)]


def test_greedy_takes_the_likeliest() -> None:
    assert draws(3, temperature=0) == [1, 1, 1]


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    tokens = draws(temperature=0.5)
    expected = torch.softmax(LOGITS / 0.5, -1)
    for token in range(5):
        assert tokens.count(token) / len(tokens) == pytest.approx(float(expected[token]), abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    p = torch.softmax(LOGITS, -1)
    assert nucleus(p, 0.4).tolist() == [1]
    assert nucleus(p, 0.7).tolist() == [1, 4]
    assert set(draws(500, top_p=0.7)) == {1, 4}


def test_top_p_over_a_flat_vocabulary_larger_than_the_first_guess() -> None:
    assert nucleus(torch.full((1000,), 1e-3, dtype=torch.float64), 0.9).numel() == pytest.approx(900, abs=1)


def test_a_sequence_draws_the_same_whatever_runs_beside_it() -> None:
    logits = torch.randn((6, 50), generator=torch.Generator().manual_seed(0))
    params = SamplingParams(seed=11, temperature=1.0, top_p=0.9)
    alone = Sampler(params, 50)
    beside = [Sampler(SamplingParams(seed=i), 50) for i in range(5)]
    mine = Sampler(params, 50)
    for _ in range(20):
        batch = sample_batch(logits.clone(), [*beside, mine])
        (expected,) = sample_batch(logits[5:].clone(), [alone])
        assert batch[5] is not None and expected is not None
        assert batch[5].token == expected.token


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_a_row_that_is_no_distribution_gets_no_token(settings: dict[str, Any]) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0, 1, nan], [0, inf, 1], [-inf, -inf, -inf], [-inf, 3, -inf]]
    samplers = [Sampler(SamplingParams(**settings), 3) for _ in rows]
    found = sample_batch(torch.tensor(rows), samplers)
    assert [one and one.token for one in found] == [None, None, None, 1]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest(temperature: float) -> None:
    assert draws(3, temperature=temperature) == [1, 1, 1]


def test_bias_and_penalties() -> None:
    assert draws(2, temperature=0, logit_bias={1: -100.0}) == [4, 4]
    assert draws(4, temperature=0, presence_penalty=0.7) == [1, 4, 1, 1]
    assert draws(4, temperature=0, frequency_penalty=0.7) == [1, 4, 1, 2]


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(SamplingParams(temperature=0, top_logprobs=2), 5)
    sampled = sampler.choose(LOGITS.clone())
    expected = torch.log_softmax(LOGITS, -1)
    assert sampled.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in sampled.top] == [1, 4]
    assert math.isnan(Sampler(SamplingParams(temperature=0), 5).choose(LOGITS.clone()).logprob)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1, "seed": 0}, {"top_p": 0, "seed": 0}, {"temperature": 1}, {"max_tokens": 0, "seed": 0},
        {"logit_bias": {1: 101}, "seed": 0}, {"top_logprobs": 21, "seed": 0}, {"presence_penalty": 3, "seed": 0},
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(settings: dict[str, Any]) -> None:
    name = "seed" if settings == {"temperature": 1} else next(iter(settings))
    with pytest.raises(InvalidArgument, match=name):
        SamplingParams(**settings)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="logit_bias"):
        Sampler(SamplingParams(temperature=0, logit_bias={5: 1.0}), 5)
