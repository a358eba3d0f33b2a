"""One of several ranks that train a job together; leading.py is the one that says what they do.

A base that is sharded over them (sharded.py) makes a pass one of all ranks: those that have no slice of their own, or
fail in it, lend their shards all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lathe.common.errors import FailedPrecondition
from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.engine import Engine
from lathe.engine.full import FullModel, is_full
from lathe.engine.sequences import SequenceState, StepOutput

T = TypeVar("T")


class Group(Protocol):
    """The ranks together: every rank makes the same calls in the same order. They raise RankLost when one is gone, and
    leave the tensor as it was then."""

    def add_up(self, tensor: Tensor) -> None:
        """It becomes the sum over all ranks', in place."""

    def broadcast(self, tensor: Tensor) -> None:
        """It becomes rank 0's, in place."""


class RankEngine(Engine):
    """One rank's engine: before a step its gradients become the sum of all ranks'."""

    _group: Group | None = None

    def join(self, group: Group) -> None:
        """From now on this is one of several ranks."""
        self._group = group

    @property
    def group(self) -> Group:
        assert self._group is not None, "a rank that has joined no other"
        return self._group

    def sum_gradients(self, key: str) -> float:
        """Answers the sum's norm. Raises RankLost, and changes nothing then, when another rank is gone."""
        gradients = self.gradients(key)
        if self._group is not None:
            self._group.add_up(gradients)
        return float(torch.linalg.vector_norm(gradients))

    def lend(self, *, training: bool) -> None:
        """A pass of the others, to which this rank gives its shards and nothing else."""
        with self._passing(training=training):
            pass

    def forward_backward(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        with self._passing(training=True):
            return super().forward_backward(pieces)

    def evaluate(self, pieces: Sequence[TrainSlice]) -> list[SliceResult]:
        with self._passing(training=False):
            return super().evaluate(pieces)

    def measure(self, key: str, rows: Sequence[TrainRow]) -> int | None:
        with self._passing(training=True):
            return super().measure(key, rows)

    def logprobs(self, key: str, tokens: Sequence[int]) -> list[float]:
        with self._passing(training=False):
            return super().logprobs(key, tokens)

    def step(self, sequences: Sequence[SequenceState], *, prefill_tokens: int = 256) -> list[StepOutput]:
        with self._passing(training=False):
            return super().step(sequences, prefill_tokens=prefill_tokens)

    def load_adapter(self, key: str, folder: Path) -> None:
        """As Engine's. Raises FailedPrecondition for a whole model beside a sharded base."""
        if is_full(folder):
            self._refuse_whole_models()
        super().load_adapter(key, folder)

    def drop_if_held(self, key: str) -> None:
        if key in self.adapter_keys():
            Engine.drop_adapter(self, key)

    def _passing(self, *, training: bool) -> AbstractContextManager[None]:
        return self.decoder.weights.parts.passing(training=training)

    def _full(self, folder: Path) -> FullModel:
        self._refuse_whole_models()
        return super()._full(folder)

    def _refuse_whole_models(self) -> None:
        if self.sharded:
            raise FailedPrecondition(
                "This engine's base model is sharded over its workers, since it does not fit one: a whole tuned model "
                "would fit it still less. Train an adapter, or use workers with more memory."
            )


Work = Callable[[RankEngine], T]
