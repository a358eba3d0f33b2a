"""What a recipe says to the loop that runs it.

A recipe is a generator. It asks for a pass over the model by yielding a request and receives the answer there, so
that the loop can join passes of several jobs and sample between them; everything else that it yields is told to
others. What a pass raised is raised at the yield.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lathe.engine.batch import SliceResult, TrainRow, TrainSlice
from lathe.engine.model import Note, Snapshot, StepMetrics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Forward:
    """Slices in one pass; answered by a list of SliceResult. training: add to the gradients."""

    pieces: tuple[TrainSlice, ...]
    training: bool = True

    @property
    def rows(self) -> tuple[TrainRow, ...]:
        return tuple(row for piece in self.pieces for row in piece.rows)

    @property
    def input_tokens(self) -> int:
        return sum(piece.input_tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Measure:
    """How much memory a training pass over the rows takes; answered in bytes, or None. Changes nothing else."""

    rows: tuple[TrainRow, ...]
    key: str

    @property
    def input_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Generate:
    """Greedy answers to prompts, between the passes of others; answered by a list of token lists."""

    key: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Blocked:
    """Nothing can be done for this attempt now; go on with it in `seconds`."""

    seconds: float
    reason: str


Request = Forward | Measure | Generate
RecipeEvent = StepMetrics | Snapshot | Note
Turn = Request | Blocked | RecipeEvent
Turns = Generator[Turn, Any, T]


def forward(pieces: Sequence[TrainSlice], *, training: bool = True) -> Turns[list[SliceResult]]:
    """The slices' results; see Engine.forward_backward and Engine.evaluate."""
    results: list[SliceResult] = yield Forward(tuple(pieces), training)
    return results


def measure(key: str, rows: Sequence[TrainRow]) -> Turns[int | None]:
    """The pass's memory; see Engine.measure."""
    taken: int | None = yield Measure(tuple(rows), key)
    return taken


def generate(
    key: str, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: frozenset[int]
) -> Turns[list[tuple[int, ...]]]:
    """Greedy answers, without their stop token."""
    answers: list[tuple[int, ...]] = yield Generate(
        key, tuple(tuple(prompt) for prompt in prompts), max_tokens, stop_ids
    )
    return answers
