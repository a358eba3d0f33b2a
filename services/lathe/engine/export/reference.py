"""What our own decoder answers: the measure that every export is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lathe.engine.bank import AdapterBank
from lathe.engine.base import Decoder
from lathe.engine.weights import load_weights, read_spec


class Reference:
    """A base, with an adapter on it or without, in float32 on the CPU: 4 bytes a weight."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        """Raises InvalidArgument for what the engine cannot load."""
        spec, device = read_spec(base), torch.device("cpu")
        weights = load_weights(base, spec, device=device, dtype=torch.float32)
        self._decoder = Decoder(spec, weights)
        self._bank = AdapterBank(spec.sites(), weights)
        self._slot = -1
        if adapter is not None:
            self._slot = 0
            self._bank.load(0, adapter)

    @property
    def vocab_size(self) -> int:
        return self._decoder.spec.vocab_size

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [T, vocab] after each token of one row."""
        with torch.no_grad():
            flat, slots = torch.tensor(list(tokens)), [self._slot]
            hidden = self._decoder.forward(flat, torch.arange(len(flat)), [len(flat)], slots, self._bank)
            return self._decoder.logits(hidden, self._bank.plan_head(slots, [len(flat)]))


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """largest: over all tokens and the whole vocabulary; spread: the largest standard deviation of one token's
    logits, which says how much that is; tokens: how many were compared."""

    largest: float
    spread: float
    tokens: int

    @property
    def relative(self) -> float:
        return self.largest / self.spread if self.spread else self.largest


def logit_difference(
    expected: Sequence[Tensor], other: Reference, rows: Sequence[Sequence[int]]
) -> LogitDifference:
    """expected: the logits of the same rows. A NaN anywhere makes `largest` NaN."""
    # Tensors all the way: Python's max(0.0, nan) is 0.0.
    largest = spread = torch.zeros(())
    for logits, row in zip(expected, rows, strict=True):
        largest = torch.maximum(largest, (logits - other.logits(row)).abs().max())
        spread = torch.maximum(spread, logits.std(dim=-1).max())
    return LogitDifference(float(largest), float(spread), sum(len(row) for row in rows))
