"""Before a run's first step: does the heaviest slice that its data can give fit into the engine's memory?

It is measured, by a real pass over real rows whose gradients are forgotten, unless one at least as heavy was measured
before. Since a machine may end a process that takes too much without a word, an eighth of the slice goes first: only
what it promises to leave room for is tried. What does not fit is planned in smaller slices, which changes neither the
batch nor its loss; a single row (a pair) that does not fit is refused with what it needs and what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lathe.common.errors import FailedPrecondition
from lathe.engine.batch import TrainRow, trained_tokens
from lathe.engine.memory import Load, Measurement, bound
from lathe.engine.model import Note
from lathe.engine.passes import is_out_of_memory
from lathe.engine.recipes.turns import Turns, measure

# Of what is free, how much a pass may take: adapters of others come, and memory is not used without gaps.
USABLE = 0.9
# Which parts of the heaviest slice go first: an eighth, and a quarter where that does not settle it.
TRIALS = (8, 4)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run's preflight asks of its surroundings.

    free: bytes that a pass may take now, None where nobody knows. known: what was measured before for such an adapter;
    learn: keep a measurement.
    """

    free: Callable[[], int | None]
    known: Callable[[], Sequence[Measurement]]
    learn: Callable[[Measurement], None]


@dataclass(frozen=True, slots=True)
class Room:
    """tokens: how many one pass may have, None for as many as the plan gives it. note: what to tell the user."""

    tokens: int | None = None
    note: Note | None = None


def find_room(
    memory: Memory, key: str, rows: Sequence[TrainRow], *, unit: int, batch_size: int, slice_tokens: int
) -> Turns[Room]:
    """The slices that fit. Raises FailedPrecondition with reason OUT_OF_MEMORY where no plan does."""
    budget, first_need = slice_tokens, 0
    while True:
        slice_ = heaviest(rows, unit=unit, batch_size=batch_size, max_tokens=budget)
        need = yield from _need(memory, key, slice_)
        free = memory.free()
        if need is None or free is None or need <= free * USABLE:
            break
        first_need = first_need or need
        if len(slice_) <= unit:
            raise FailedPrecondition(_too_long(slice_, need, free, unit), reason="OUT_OF_MEMORY")
        budget = max(1, min(budget, load_of(slice_).tokens) // 2)
    if budget == slice_tokens:
        return Room()
    return Room(
        budget,
        Note(
            0,
            "out_of_memory",
            f"A slice of {slice_tokens} tokens needs about {_size(first_need)}, and {_size(free or 0)} are free on "
            f"this engine: the job is computed in slices of at most {budget} tokens. The batch stays the same.",
        ),
    )


def heaviest(
    rows: Sequence[TrainRow], *, unit: int, batch_size: int, max_tokens: int
) -> tuple[TrainRow, ...]:
    """The heaviest slice that the data can give: as many of the longest units as fit, at least one.

    Each slice of the plan has no row longer than its longest, and at most one short unit's tokens more.
    """
    units = [tuple(rows[start : start + unit]) for start in range(0, len(rows), unit)]
    units.sort(key=lambda rows: sum(len(row.tokens) for row in rows), reverse=True)
    chosen, tokens = list(units[0]), sum(len(row.tokens) for row in units[0])
    for other in units[1:]:
        size = sum(len(row.tokens) for row in other)
        if len(chosen) < batch_size * unit and tokens + size <= max_tokens:
            chosen += other
            tokens += size
    return tuple(chosen)


def load_of(rows: Sequence[TrainRow]) -> Load:
    """What of the rows decides over memory."""
    lengths = [len(row.tokens) for row in rows]
    return Load(sum(lengths), max(lengths), sum(trained_tokens(row) for row in rows))


def _need(memory: Memory, key: str, rows: Sequence[TrainRow]) -> Turns[int | None]:
    """What a pass over the rows takes: known, measured, or estimated where measuring it would be too much."""
    load = load_of(rows)
    known = _known(memory, load)
    if known is not None:
        return known
    trials: list[Measurement] = []
    for part in TRIALS:
        rows_of_trial = [_shortened(row, part) for row in rows]
        taken, free = (yield from _measured(memory, key, rows_of_trial)), memory.free()
        if taken is None or free is None:
            return None
        trials.append(Measurement(load_of(rows_of_trial), taken))
        estimate = estimated(trials, load.tokens)
        if estimate <= free * USABLE:
            return (yield from _measured(memory, key, rows)) or estimate
    return estimate


def _known(memory: Memory, load: Load) -> int | None:
    """What earlier measurements say. That a heavier pass does not fit says nothing of this one: None then."""
    measured = memory.known()
    exact = [item.bytes for item in measured if item.load == load]
    if exact:
        return min(exact)
    most, free = bound(measured, load), memory.free()
    return most if most is not None and (free is None or most <= free * USABLE) else None


def estimated(trials: Sequence[Measurement], tokens: int) -> int:
    """What a pass over so many tokens takes, by what shorter ones of the same rows took.

    One trial: in proportion, which is too much where a part does not grow. Two: by the line through them.
    """
    last = trials[-1]
    if len(trials) == 1 or last.load.tokens == trials[0].load.tokens:
        return last.bytes * tokens // last.load.tokens
    first = trials[0]
    slope = max(0.0, (last.bytes - first.bytes) / (last.load.tokens - first.load.tokens))
    return last.bytes + round(slope * (tokens - last.load.tokens))


def _measured(memory: Memory, key: str, rows: Sequence[TrainRow]) -> Turns[int | None]:
    try:
        taken = yield from measure(key, rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # It took all there was, and more.
        return (memory.free() or 0) + 1
    if taken is not None:
        memory.learn(Measurement(load_of(rows), taken))
    return taken


def _shortened(row: TrainRow, part: int) -> TrainRow:
    """The end of a row, where its trained tokens are."""
    length = max(2, len(row.tokens) // part)
    return replace(row, tokens=row.tokens[-length:], mask=row.mask[-length:])


def _too_long(rows: Sequence[TrainRow], need: int, free: int, unit: int) -> str:
    tokens = load_of(rows).tokens
    what = f"A row of {tokens} tokens" if unit == 1 else f"A pair of {tokens} tokens"
    line = f" (line {rows[0].line})" if rows[0].line else ""
    fits = int(tokens * free * USABLE / max(1, need))
    return (
        f"{what}{line} needs about {_size(need)} of memory, and {_size(free)} are free on this engine: shorten it to "
        f"about {fits} tokens, or use a bigger machine."
    )


def _size(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB" if amount >= 10_000_000 else f"{amount / 1e6:.2f} MB"
