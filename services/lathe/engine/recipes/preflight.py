"""Before a run's first step: do the heaviest slices that its data can give fit into the engine's memory?

Each is measured, by a real pass over real rows whose gradients are forgotten, unless one at least as heavy was
measured before. Since a machine may end a process that takes too much without a word, an eighth of the slice goes
first: only what it promises to leave room for is tried. What does not fit is planned in smaller slices, which changes
neither the batch nor its loss; a single row (a pair) that does not fit is refused with what it needs and what there is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

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
# Attention's padded rows are about a tenth of what a pass holds of a token: up to twice as much is within USABLE.
PADDING = 2


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
    """tokens: how many one pass may have, None for as many as the plan gives it. note: what to tell the user.

    need: bytes of the heaviest pass, of need_tokens tokens; None where that cannot be measured.
    """

    tokens: int | None = None
    note: Note | None = None
    need: int | None = None
    need_tokens: int = 0

    @property
    def memory_note(self) -> Note | None:
        """What `jobs` estimates the memory of later jobs by."""
        if self.need is None:
            return None
        text = f"The heaviest slice, of {self.need_tokens} tokens, takes about {_size(self.need)} beside the weights."
        return Note(0, "memory", text, {"bytes": str(self.need), "tokens": str(self.need_tokens)})


def find_room(
    memory: Memory, key: str, rows: Sequence[TrainRow], *, unit: int, batch_size: int, slice_tokens: int
) -> Turns[Room]:
    """The slices that fit. Raises FailedPrecondition with reason OUT_OF_MEMORY where no plan does."""
    budget, first_need = slice_tokens, 0
    while True:
        most: tuple[int, int] | None = None
        for slice_ in heaviest(rows, unit=unit, batch_size=batch_size, max_tokens=budget):
            need = yield from _need(memory, key, slice_)
            free = memory.free()
            if need is not None and free is not None and need > free * USABLE:
                break
            if need is not None:
                most = max(most or (0, 0), (need, load_of(slice_).tokens))
        else:
            break
        first_need = first_need or need
        if len(slice_) <= unit:
            raise FailedPrecondition(_too_long(slice_, need, free, unit), reason="OUT_OF_MEMORY")
        budget = max(1, min(budget, load_of(slice_).tokens) // 2)
    if budget == slice_tokens:
        return _room(most)
    return replace(_room(most), tokens=budget, note=_smaller(slice_tokens, budget, first_need, free))


def _room(most: tuple[int, int] | None) -> Room:
    return Room(need=most[0], need_tokens=most[1]) if most is not None else Room()


def _smaller(slice_tokens: int, budget: int, need: int | None, free: int | None) -> Note:
    return Note(
        0,
        "out_of_memory",
        f"A slice of {slice_tokens} tokens needs about {_size(need or 0)}, and {_size(free or 0)} are free on "
        f"this engine: the job is computed in slices of at most {budget} tokens. The batch stays the same.",
    )


def heaviest(
    rows: Sequence[TrainRow], *, unit: int, batch_size: int, max_tokens: int
) -> list[tuple[TrainRow, ...]]:
    """The heaviest slices that the data can give: the one of the most tokens, and the one that attention pads most
    where that is more than PADDING times as much.

    Each slice of the plan has no row longer than their longest, and at most one short unit's tokens more.
    """
    units = [tuple(rows[start : start + unit]) for start in range(0, len(rows), unit)]
    units.sort(key=_tokens)
    slices = [_most_tokens(units, batch_size, max_tokens), _most_padded(units, batch_size, max_tokens)]
    most, padded = map(load_of, slices)
    is_heavier = padded.longest > most.longest or padded.padded > PADDING * most.padded
    return slices if is_heavier else slices[:1]


def _most_tokens(units: Sequence[Sequence[TrainRow]], batch_size: int, room: int) -> tuple[TrainRow, ...]:
    """As many of the longest units as fit, at least one. units: ordered by their tokens."""
    chosen = list(units[-1])
    count, left = 1, room - _tokens(units[-1])
    for other in reversed(units[:-1]):
        if count < batch_size and _tokens(other) <= left:
            chosen += other
            count, left = count + 1, left - _tokens(other)
    return tuple(chosen)


def _most_padded(units: Sequence[Sequence[TrainRow]], batch_size: int, room: int) -> tuple[TrainRow, ...]:
    """One unit and as many of the shortest as fit beside it: the one whose longest row times all rows is the most."""
    sums = list(accumulate(map(_tokens, units)))
    together = bisect_right(sums, room)

    def beside(index: int) -> int:
        fit = together - 1 if index < together else bisect_right(sums, room - _tokens(units[index]))
        return min(batch_size - 1, fit)

    def padded(index: int) -> tuple[int, int]:
        longest = max(len(row.tokens) for row in units[index])
        return longest * (1 + beside(index)), longest

    most = max(range(len(units)), key=padded)
    others = [*units[:most], *units[most + 1 :]][: beside(most)]
    return tuple(row for one in (units[most], *others) for row in one)


def _tokens(rows: Sequence[TrainRow]) -> int:
    return sum(len(row.tokens) for row in rows)


def load_of(rows: Sequence[TrainRow]) -> Load:
    """What of the rows decides over memory."""
    lengths = [len(row.tokens) for row in rows]
    trained = sum(trained_tokens(row) for row in rows)
    return Load(sum(lengths), max(lengths), trained, len(rows) * max(lengths))


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
