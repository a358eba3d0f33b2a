"""Room in the key/value cache, without a model: what is computed when, and what counts as cached."""

from __future__ import annotations

import pytest
import torch

from lathe.engine.claims import Claims
from lathe.engine.kv import KVCache
from lathe.engine.sampling import Sampler, SamplingParams
from lathe.engine.sequences import SequenceState

LONGROPE = 40  # tokens of the original context


def claims(tokens: int = 1024, longrope: int | None = LONGROPE) -> Claims:
    cache = KVCache(
        layers=1,
        width=2,
        max_length=512,
        budget_bytes=tokens * 8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Claims(cache, longrope)


def sequence(prompt: range) -> SequenceState:
    sampler = Sampler(SamplingParams(temperature=0), 1000)
    return SequenceState("", tuple(prompt), sampler, limit=100)


def prefill(room: Claims, *states: SequenceState, chunk: int = 16) -> list[int]:
    """Computes the prompts; how many tokens each pass had."""
    passes = []
    while any(state.done < state.total for state in states):
        taken = room.take(states, chunk, str)
        assert taken
        for state, tokens in taken:
            state.done += len(tokens)
        passes.append(sum(len(tokens) for _, tokens in taken))
    return passes


@pytest.mark.parametrize("longrope", [None, LONGROPE])
def test_a_prompt_in_chunks_keeps_its_slot_and_is_not_its_own_cache(longrope: int | None) -> None:
    room, state = claims(longrope=longrope), sequence(range(60))
    assert prefill(room, state) == [16, 16, 16, 12]
    assert state.cached_tokens == 0

    again = sequence(range(60))
    assert prefill(room, again) == [1]
    assert again.cached_tokens == 59


def test_crossing_longropes_context_computes_all_tokens_anew_and_counts_none_of_them_as_cached() -> None:
    room, state = claims(), sequence(range(38))
    prefill(room, state)
    passes = []
    for token in range(100, 105):
        state.tokens.append(token)
        passes.append(prefill(room, state, chunk=64))
    assert passes == [[1], [1], [41], [1], [1]]
    assert state.cached_tokens == 0


def test_a_sequence_that_lost_its_room_counts_nothing_of_its_own_as_cached() -> None:
    room = claims(tokens=100)
    first, second = sequence(range(40)), sequence(range(200, 260))
    room.take([first, second], 80, str)
    first.done, second.done = 40, 40
    for token in range(100, 130):
        # The first grows; the second gives up its room, whose beginning stays for as long as it is not needed.
        first.tokens.append(token)
        first.done += len(room.take([first], 80, str)[0][1])
    room.release(second)
    room.release(first)
    prefill(room, second, chunk=80)
    assert second.cached_tokens == 0
