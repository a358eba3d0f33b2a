"""The key/value cache: slots in one pool, with reuse of common prefixes.

The pool is [layers, slots, length, 2 * kv_heads * head_dim]: the keys, then the values, of a token side by side. It
starts small and grows by doubling either side; slots * length never exceeds the budget. A freed slot keeps its
tokens, so a later prompt with the same beginning under the same adapter starts from them, until the slot is needed
(least recently used first).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lathe.common.errors import ResourceExhausted

_FIRST_SLOTS = 4
_FIRST_LENGTH = 256


@dataclass(slots=True)
class _Entry:
    key: str = ""
    tokens: list[int] = field(default_factory=list)  # the tokens whose keys and values are in the slot
    live: bool = False
    used: int = 0


class KVCache:
    """Slots for sequences. Every method is cheap but those that grow the pool or copy a prefix."""

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        max_length: int,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        max_slots: int = 64,
    ) -> None:
        self._token_bytes = layers * width * torch.empty((), dtype=dtype).element_size()
        self._budget_tokens = budget_bytes // self._token_bytes
        self._max_length, self._max_slots = max_length, max_slots
        self._entries: list[_Entry] = []
        self._length = 0
        self._clock = 0
        self.data = torch.empty((layers, 0, 0, width), dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Tokens a slot can hold at present."""
        return self._length

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def allocate(self, tokens: Sequence[int], key: str) -> tuple[int, int]:
        """A slot that can hold these tokens, and how many of them (the first ones) are in it already.

        At most len(tokens) - 1 are reused, since the last one's logits are wanted. key names the adapter and its
        version. Raises ResourceExhausted when the live sequences leave no room.
        """
        wanted = list(tokens)
        source, reused = self._longest_prefix(wanted, key)
        if source is not None and self._may_take_over(source, reused):
            slot = source
            self._reserve(len(wanted), slot)
            reused = min(reused, len(self._entries[slot].tokens))
        else:
            slot = self._free_slot(len(wanted), keep=source)
            # Growing the pool may have cut the source short, or away.
            held = (
                len(self._entries[source].tokens) if source is not None and source < len(self._entries) else 0
            )
            reused = min(reused, held)
            if slot != source and reused:
                self.data[:, slot, :reused].copy_(self.data[:, source, :reused])
        self._clock += 1
        self._entries[slot] = _Entry(key, wanted[:reused], True, self._clock)
        return slot, reused

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Makes room for these further tokens and notes that the coming pass writes them.

        Raises ResourceExhausted, leaving the slot as it was, when the budget does not allow it.
        """
        entry = self._entries[slot]
        self._reserve(len(entry.tokens) + len(tokens), slot)
        entry.tokens.extend(tokens)
        self._clock += 1
        entry.used = self._clock

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the slot's tokens from this one on (a pass that was to write them failed)."""
        del self._entries[slot].tokens[length:]

    def tokens_in(self, slot: int) -> int:
        return len(self._entries[slot].tokens)

    def free(self, slot: int, *, spoilt: bool = False) -> None:
        """The sequence is over; its tokens stay for reuse, unless what was written for them is spoilt."""
        entry = self._entries[slot]
        entry.live = False
        if spoilt:
            self.data[:, slot, : len(entry.tokens)].zero_()
            entry.tokens.clear()

    def forget(self, key: str) -> None:
        """Drops what retired slots hold under this key (its adapter changed or went away)."""
        for entry in self._entries:
            if entry.key == key and not entry.live:
                entry.tokens.clear()

    def _longest_prefix(self, tokens: list[int], key: str) -> tuple[int | None, int]:
        best: int | None = None
        longest = 0
        for slot, entry in enumerate(self._entries):
            if entry.key == key and entry.tokens:
                n = min(common_prefix(entry.tokens, tokens), len(tokens) - 1)
                # Between equals a retired slot is better: it can be taken over without a copy.
                if n > longest or (n == longest > 0 and not entry.live):
                    best, longest = slot, n
        return best, longest

    def _may_take_over(self, slot: int, reused: int) -> bool:
        entry = self._entries[slot]
        return not entry.live and reused * 2 >= len(entry.tokens)

    def _live(self) -> int:
        return sum(entry.live for entry in self._entries)

    def _reserve(self, length: int, slot: int) -> None:
        """Room for `length` tokens in a slot; it and the other live slots keep theirs."""
        if length <= self._length:
            return
        new = max(self._length, _FIRST_LENGTH)
        while new < length:
            new *= 2
        new = min(new, self._max_length)
        if length > new:
            raise ResourceExhausted(
                f"a sequence of {length} tokens is longer than the context of {new}.", retry_after=None
            )
        highest = max((i for i, entry in enumerate(self._entries) if entry.live), default=slot)
        slots = max(min(len(self._entries), self._budget_tokens // new), 0)
        if slots <= max(highest, slot):
            new = length
            slots = min(len(self._entries), self._budget_tokens // new)
            if slots <= max(highest, slot):
                raise self._exhausted()
        self._reshape(slots, new)

    def _free_slot(self, length: int, keep: int | None) -> int:
        """An unused slot, the lowest first; else a new one; else the least recently used retired one."""
        for slot, entry in enumerate(self._entries):
            if not entry.live and not entry.tokens:
                self._reserve(length, slot)
                return slot
        if len(self._entries) < self._max_slots:
            self._grow_slots(length)
        retired = [i for i, entry in enumerate(self._entries) if not entry.live]
        if not retired:
            raise self._exhausted()
        retired.sort(key=lambda i: (bool(self._entries[i].tokens), i == keep, self._entries[i].used))
        self._reserve(length, retired[0])
        return retired[0]

    def _grow_slots(self, length: int) -> None:
        new = max(self._length, min(_FIRST_LENGTH, self._max_length))
        while new < length:
            new *= 2
        new = min(new, self._max_length)
        count = len(self._entries)
        slots = min(max(2 * count, _FIRST_SLOTS), self._max_slots, self._budget_tokens // max(new, 1))
        if slots <= count and self._live() == count:
            # All slots are in use and long: shorten them to what the live ones need.
            new = max([length, *(len(entry.tokens) for entry in self._entries if entry.live)])
            slots = min(count + 1, self._budget_tokens // new)
        if slots > count:
            self._reshape(slots, new)

    def _reshape(self, slots: int, length: int) -> None:
        old, layers, width = self.data, self.data.shape[0], self.data.shape[3]
        self.data = _zeros((layers, slots, length, width), old)
        for slot, entry in enumerate(self._entries[:slots]):
            del entry.tokens[length:]
            kept = len(entry.tokens)
            if kept:
                self.data[:, slot, :kept].copy_(old[:, slot, :kept])
        del self._entries[slots:]
        self._entries.extend(_Entry() for _ in range(slots - len(self._entries)))
        self._length = length

    def _exhausted(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"the key/value cache of {self._budget_tokens} tokens is full of running sequences; try again later.",
            reason="KV_CACHE_FULL",
            retry_after=1.0,
        )


def _zeros(shape: tuple[int, int, int, int], like: torch.Tensor) -> torch.Tensor:
    """Zeros, not empty: a batched decode multiplies masked places by 0, and 0 times a stray NaN is NaN.

    On a CPU the kernel gives zeros page by page as they are touched: writing them took 140 ms for 360 MB, in the
    middle of a stream, and made every slot resident that nobody has used yet.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(shape)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning (compared in blocks, at C speed for lists)."""
    n, limit, block = 0, min(len(a), len(b)), 64
    while n < limit and a[n : n + block] == b[n : n + block]:
        n = min(n + block, limit)
    while n < limit and a[n] == b[n]:
        n += 1
    return n
