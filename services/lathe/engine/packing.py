"""The plan of a training run: which rows each step and each slice takes. Pure; no torch.

A unit is one or more adjacent rows of the data that belong together (both answers of a preference pair): batches are
counted in units, and no unit is split over slices.

The plan is a function of (lengths, settings, seed) alone, so a resumed attempt computes the same steps, and a
step can be asked for by its index without going through the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from lathe.common.errors import FieldViolation, InvalidArgument


@dataclass(frozen=True, slots=True)
class Slice:
    """Whole rows that go through the model in one pass (the micro-batch); indices into the data set."""

    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its rows, in order, cut into slices. `index` and `epoch` count from 0."""

    index: int
    epoch: int
    slices: tuple[Slice, ...]
    ends_epoch: bool

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(row for piece in self.slices for row in piece.rows)


@dataclass(frozen=True)
class TrainPlan:
    """Answers `step(index)`; made by `slice_plan`. Keeps the newest epoch's permutation only as a cache."""

    lengths: tuple[int, ...]
    n_epochs: int
    batch_size: int
    seed: int
    max_tokens_per_slice: int
    unit: int = 1
    _cache: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return -(-(len(self.lengths) // self.unit) // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.n_epochs

    def step(self, index: int) -> Step:
        """The step with this index. Raises InvalidArgument outside 0 … total_steps - 1."""
        if not 0 <= index < self.total_steps:
            raise InvalidArgument(f"step {index} is outside the plan of {self.total_steps} steps.")
        epoch, place = divmod(index, self.steps_per_epoch)
        order = self._order(epoch)
        units = order[place * self.batch_size : (place + 1) * self.batch_size]
        rows = [unit * self.unit + i for unit in units for i in range(self.unit)]
        slices = cut(rows, self.lengths, self.max_tokens_per_slice, self.unit)
        return Step(index, epoch, slices, ends_epoch=place == self.steps_per_epoch - 1)

    def _order(self, epoch: int) -> tuple[int, ...]:
        if epoch not in self._cache:
            self._cache.clear()
            self._cache[epoch] = permutation(len(self.lengths) // self.unit, self.seed, epoch)
        return self._cache[epoch]


def slice_plan(
    lengths: Sequence[int],
    *,
    n_epochs: int,
    batch_size: int,
    seed: int,
    max_tokens_per_slice: int,
    unit: int = 1,
) -> TrainPlan:
    """Makes the plan for rows of these token counts; batch_size counts units of `unit` adjacent rows.

    The last batch of an epoch may be smaller; each row is taken exactly once an epoch.
    Raises InvalidArgument when there is no row, a row is empty, the last unit is not whole, or a setting is not
    positive.
    """
    for name, value in (
        ("n_epochs", n_epochs),
        ("batch_size", batch_size),
        ("max_tokens_per_slice", max_tokens_per_slice),
        ("unit", unit),
    ):
        if value < 1:
            violation = FieldViolation(name, "must be at least 1")
            raise InvalidArgument(f"{name} is {value}; it must be at least 1.", violations=(violation,))
    if not lengths:
        raise InvalidArgument("there is no row to train on.")
    if min(lengths) < 1:
        raise InvalidArgument(f"row {lengths.index(min(lengths))} has no tokens; leave it out of the data.")
    if len(lengths) % unit:
        raise InvalidArgument(f"{len(lengths)} rows are not whole units of {unit}; a row is missing.")
    return TrainPlan(tuple(lengths), n_epochs, batch_size, seed, max_tokens_per_slice, unit)


def cut(rows: Sequence[int], lengths: Sequence[int], max_tokens: int, unit: int = 1) -> tuple[Slice, ...]:
    """Cuts rows, order kept, into slices of whole units of at most `max_tokens`; a longer unit is a slice by itself."""
    slices: list[Slice] = []
    current: list[int] = []
    tokens = 0
    for start in range(0, len(rows), unit):
        together = rows[start : start + unit]
        size = sum(lengths[row] for row in together)
        if current and tokens + size > max_tokens:
            slices.append(Slice(tuple(current)))
            current, tokens = [], 0
        current += together
        tokens += size
    if current:
        slices.append(Slice(tuple(current)))
    return tuple(slices)


def halve(piece: Slice, unit: int = 1) -> tuple[Slice, ...]:
    """The two halves of a slice, for a replay after running out of memory; a single unit stays one slice."""
    middle = (len(piece.rows) // unit + 1) // 2 * unit
    return tuple(Slice(rows) for rows in (piece.rows[:middle], piece.rows[middle:]) if rows)


def permutation(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of n rows in an epoch: sorted by a keyed hash, so it is the same on every Python and machine."""
    prefix = f"lathe-epoch:{seed}:{epoch}:".encode()
    keys = [blake2b(prefix + str(i).encode(), digest_size=16).digest() for i in range(n)]
    return tuple(sorted(range(n), key=keys.__getitem__))
