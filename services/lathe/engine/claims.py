"""The room that sequences have in the key/value cache: which of their tokens the coming pass computes, who waits, and
who gives room up. No tensors of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lathe.common.errors import ResourceExhausted
from lathe.engine.kv import KVCache, common_prefix
from lathe.engine.sequences import SequenceState

# A prompt waits for another one that is being computed when they share at least this many further tokens.
_WORTH_WAITING = 8
# Ends the cache key of sequences beyond longrope's original context.
_FAR = "+far"

# A sequence, and its tokens that go through the pass.
Chunk = tuple[SequenceState, list[int]]


class Claims:
    """longrope_context: beyond so many tokens longrope rotates by other frequencies; None for any other kind."""

    def __init__(self, cache: KVCache, longrope_context: int | None) -> None:
        self._cache, self._longrope_context = cache, longrope_context

    def take(
        self, work: Sequence[SequenceState], prefill_tokens: int, cache_key: Callable[[str], str]
    ) -> list[Chunk]:
        """Which tokens of which sequences go through the coming pass; their room in the cache is taken.

        cache_key: an adapter's key -> what its sequences share their prefixes under. Raises ResourceExhausted when the
        cache cannot hold even one of them.
        """
        wanted: list[Chunk] = []
        begun: list[SequenceState] = []
        room = prefill_tokens
        for state in work:
            if state.kv_slot is not None and self._far(state.total) != state.far:
                self.release(state)  # its keys were rotated by the other frequencies
            pending = state.pending()
            if state.kv_slot is not None and len(pending) == 1:
                wanted.append((state, pending))
                continue
            if room <= 0:
                continue
            if state.kv_slot is None:
                if self._worth_waiting(state, begun):
                    continue
                others = any(other.kv_slot is not None for other in work)
                if not self._allocate(state, cache_key(state.key), others=others):
                    continue
                pending = state.pending()
            begun.append(state)
            wanted.append((state, pending[:room]))
            room -= min(room, len(pending))
        return self._extend(work, wanted)

    def release(self, state: SequenceState) -> None:
        """Gives its room back; what it computed stays for prompts that begin alike, until the room is needed. Nothing
        stays of one that failed."""
        if state.kv_slot is not None:
            self._cache.free(state.kv_slot, spoilt=state.failure is not None)
            state.kv_slot, state.done = None, 0

    def forget(self, cache_key: str) -> None:
        """What was computed by weights that are no more."""
        for mark in ("", _FAR):
            self._cache.forget(cache_key + mark)

    def _worth_waiting(self, state: SequenceState, begun: Sequence[SequenceState]) -> bool:
        mine = state.all_tokens()
        return any(
            other.key == state.key and common_prefix(other.all_tokens(), mine) - other.done >= _WORTH_WAITING
            for other in begun
        )

    def _allocate(self, state: SequenceState, cache_key: str, *, others: bool) -> bool:
        far = self._far(state.total)
        try:
            state.kv_slot, state.done = self._cache.allocate(
                state.all_tokens(), cache_key + (_FAR if far else "")
            )
        except ResourceExhausted:
            if others:
                return False
            raise
        if state.far is None:
            # Later ones find what the sequence itself has computed.
            state.cached_tokens = state.done
        state.far = far
        return True

    def _extend(self, work: Sequence[SequenceState], wanted: list[Chunk]) -> list[Chunk]:
        """Takes room for the tokens; when there is none, the last sequences give theirs up and wait."""
        claimed: list[Chunk] = []
        for state, tokens in wanted:
            while state.kv_slot is not None:
                try:
                    self._cache.extend(state.kv_slot, tokens)
                except ResourceExhausted:
                    done = {id(other) for other, _ in claimed}
                    holders = [
                        s for s in work if s.kv_slot is not None and s is not state and id(s) not in done
                    ]
                    if not holders and not claimed:
                        raise
                    self.release(holders[-1] if holders else state)
                else:
                    claimed.append((state, tokens))
                    break
        return claimed

    def _far(self, tokens: int) -> bool:
        """Whether longrope rotates a sequence of so many tokens by its other frequencies."""
        limit = self._longrope_context
        return limit is not None and tokens > limit
