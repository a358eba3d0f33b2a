"""What a training method supplies; the run (run.py) is the same for all of them.

To add a method: subclass `Recipe`, write `objectives`, and name it in RECIPES (methods.py). A method whose loss is a
sum over tokens answers `CrossEntropy`; one whose loss is a function of whole rows' log-probabilities answers a function
(sums, counts) -> RowLoss, where sums[i] is differentiable: the engine carries the gradient into the adapter. What the
objective needs of the whole batch (how many pairs it has, the rows' log-probabilities under a reference) is found
before its first slice, so that the slices' size changes nothing:

    class Dpo(Recipe):
        unit = 2                                    # a chosen row and its rejected one are never split

        def objectives(self, batch):
            reference = yield from self.job.score(batch.rows, "")     # the base without the adapter
            pairs = len(batch.rows) // 2
            return lambda places: DpoLoss([reference[place] for place in places], self.beta, pairs)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lathe.common.errors import FailedPrecondition
from lathe.engine.batch import CrossEntropy, Objective, TrainRow, TrainSlice
from lathe.engine.model import TrainingConfig
from lathe.engine.packing import cut, halve
from lathe.engine.passes import is_out_of_memory
from lathe.engine.ports import TrainVerbs
from lathe.engine.recipes.turns import Turns, forward

# Answers the objective of some of a batch's rows, given by their places in it.
Objectives = Callable[[Sequence[int]], Objective]


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step, or of one validation. indices: which rows of their file they are."""

    rows: tuple[TrainRow, ...]
    indices: tuple[int, ...]
    training: bool


@dataclass(frozen=True, slots=True)
class TrainData:
    """Rendered rows. validation may be empty."""

    training: Sequence[TrainRow]
    validation: Sequence[TrainRow] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What a recipe works on. key: the adapter that is trained; initial: PEFT's folder that it began from, if any.

    slice_tokens: how much goes through one pass.
    """

    engine: TrainVerbs
    key: str
    data: TrainData
    config: TrainingConfig
    slice_tokens: int
    initial: Path | None = None

    def score(self, rows: Sequence[TrainRow], key: str) -> Turns[list[float]]:
        """log p of each row's trained tokens under an adapter ("" is the base), a slice for each worker at a time; what
        does not fit goes in halves. Raises FailedPrecondition for a row that does not fit."""
        lengths = [len(row.tokens) for row in rows]
        scores: list[float] = []
        pieces = list(cut(range(len(rows)), lengths, self.slice_tokens))
        while pieces:
            together = pieces[: self.engine.workers]
            slices = [
                TrainSlice(key, tuple(rows[i] for i in piece.rows), CrossEntropy(1)) for piece in together
            ]
            try:
                results = yield from forward(slices, training=False)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if all(len(piece.rows) == 1 for piece in together):
                    raise no_room(max(lengths[piece.rows[0]] for piece in together)) from error
                halves = [half for piece in together for half in halve(piece)]
                pieces = [*halves, *pieces[len(together) :]]
            else:
                scores += [-loss for result in results for loss in result.row_losses]
                pieces = pieces[len(together) :]
        return scores


def no_room(tokens: int) -> FailedPrecondition:
    """A row of so many tokens ran out of memory alone."""
    return FailedPrecondition(
        f"A row of {tokens} tokens does not fit into the engine's memory; shorten it, or use a bigger machine.",
        reason="OUT_OF_MEMORY",
    )


class Recipe(ABC):
    """A training method. `unit`: how many adjacent rows belong together; batch_size counts units.

    needs_initial: whether the adapter that a job began from is needed after its first step too.
    """

    unit: int = 1
    needs_initial: bool = False

    def __init__(self, job: Job) -> None:
        self.job = job

    def begin(self) -> Turns[None]:
        """Once an attempt, before its first step; the adapter is there."""
        yield from ()

    @abstractmethod
    def objectives(self, batch: Batch) -> Turns[Objectives]:
        """The objective of each part of a batch. The batch's loss is the sum over its slices. Every method's own."""

    def save(self, folder: Path) -> tuple[str, ...]:
        """Writes files of its own into a snapshot's folder; answers their names."""
        return ()

    def restore(self, folder: Path) -> None:  # noqa: B027 - most have nothing
        """Takes up what `save` wrote; before `begin`."""

    def close(self) -> None:  # noqa: B027 - most have nothing
        """Forgets what it loaded into the engine. May come without `begin`."""
