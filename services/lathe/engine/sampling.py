"""Choosing the next token of each sequence from its logits.

Every sequence has its own generator, and draws one number a token by inverting its cumulative distribution: what runs
beside it changes nothing but the logits' last bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lathe.common.errors import FieldViolation, InvalidArgument

MAX_TOP_LOGPROBS = 20
_NUCLEUS_GUESS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """OpenAI's sampling settings. Raises InvalidArgument naming the field.

    seed: needed when temperature > 0. top_logprobs: None for no logprobs at all.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("top_logprobs", self.top_logprobs or 0, 0, MAX_TOP_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100, 100)
        if not 0 < self.top_p <= 1:
            raise _invalid("top_p", f"{self.top_p} is outside 0 (not included) … 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _invalid("max_tokens", f"{self.max_tokens} is below 1")
        if self.temperature > 0 and self.seed is None:
            raise _invalid("seed", "needed when temperature is above 0")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token and, when asked for, its log-probability and the likeliest alternatives (natural logarithms).

    Log-probabilities are the model's own (before temperature and top_p, after bias and penalties).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """The state of one sequence: its generator and how often each token was sampled."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is not None:
            self._generator.manual_seed(params.seed % 2**63)
        self._counts: Counter[int] = Counter()
        bias = dict(params.logit_bias)
        outside = [token for token in bias if not 0 <= token < vocab_size]
        if outside:
            raise _invalid("logit_bias", f"token {outside[0]} is not in the vocabulary of {vocab_size}")
        self._bias = (torch.tensor(list(bias)), torch.tensor(list(bias.values()))) if bias else None

    @property
    def plain(self) -> bool:
        """Greedy with nothing added and nothing reported: an argmax of the whole batch serves it."""
        p = self.params
        penalties = p.presence_penalty or p.frequency_penalty
        return p.temperature == 0 and p.top_logprobs is None and self._bias is None and not penalties

    def choose(self, logits: Tensor) -> Sampled:
        """logits: fp32 [vocab] on the CPU; they are changed."""
        p = self.params
        self._adjust(logits)
        token = int(logits.argmax()) if p.temperature == 0 else self._draw(logits)
        self._counts[token] += 1
        if p.top_logprobs is None:
            return Sampled(token, math.nan, ())
        logprobs = torch.log_softmax(logits, -1)
        values, ids = logprobs.topk(p.top_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Sampled(token, float(logprobs[token]), top)

    def _adjust(self, logits: Tensor) -> None:
        p = self.params
        if self._bias is not None:
            logits.index_add_(0, *self._bias)
        if self._counts and (p.presence_penalty or p.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            ids = torch.tensor(list(self._counts))
            logits.index_add_(0, ids, counts.mul_(-p.frequency_penalty).sub_(p.presence_penalty))

    def _draw(self, logits: Tensor) -> int:
        p = self.params
        # The likeliest token's is 0, so that the lowest temperature takes it and divides nothing to infinity.
        below = (logits - logits.max()).double()
        probabilities = torch.softmax(below / p.temperature, -1)
        point = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        ids: Tensor | None = None
        if p.top_p < 1:
            ids = nucleus(probabilities, p.top_p)
            probabilities = probabilities[ids]
        total = probabilities.cumsum(-1)
        place = int(torch.searchsorted(total, point * float(total[-1]), right=True))
        place = min(place, total.numel() - 1)
        return place if ids is None else int(ids[place])


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Ids, ascending, of the smallest set of likeliest tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    size = probabilities.numel()
    values, ids = probabilities.topk(min(_NUCLEUS_GUESS, size))
    total = values.cumsum(-1)
    if float(total[-1]) < top_p and values.numel() < size:
        values, ids = probabilities.sort(descending=True)
        total = values.cumsum(-1)
    kept = min(int(torch.searchsorted(total, top_p)) + 1, values.numel())
    return ids[:kept].sort().values


def sample_batch(logits: Tensor, samplers: Sequence[Sampler]) -> list[Sampled | None]:
    """One token for each row of fp32 logits [n, vocab]; None for a row that is no distribution."""
    # NaN if there is one in the row. A single -inf is a probability of 0.
    usable = logits.amax(-1).isfinite().tolist()
    greedy = logits.argmax(-1).tolist() if any(sampler.plain for sampler in samplers) else []
    others = any(not sampler.plain for sampler in samplers)
    rows = logits.cpu() if others else logits
    return [
        None
        if not usable[i]
        else Sampled(greedy[i], math.nan, ())
        if sampler.plain
        else sampler.choose(rows[i])
        for i, sampler in enumerate(samplers)
    ]


def finite_rows(values: Tensor) -> list[bool]:
    """Which rows of [n, width] have neither NaN nor infinity in them."""
    finite: list[bool] = values.abs().amax(-1).isfinite().tolist()
    return finite


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise _invalid(name, f"{value} is outside {low} … {high}")


def _invalid(name: str, what: str) -> InvalidArgument:
    return InvalidArgument(f"{name}: {what}.", violations=(FieldViolation(name, what),))
