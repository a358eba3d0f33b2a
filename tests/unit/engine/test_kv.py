from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import ResourceExhausted
from lathe.engine.kv import KVCache, common_prefix


def cache_of(tokens: int, max_length: int = 1024, max_slots: int = 64) -> KVCache:
    return KVCache(
        layers=1, width=1, max_length=max_length, budget_bytes=4 * tokens, dtype=torch.float32,
        device=torch.device("cpu"), max_slots=max_slots,
    )  # fmt: skip


def fill(cache: KVCache, tokens: list[int], key: str = "") -> tuple[int, int]:
    """Allocates and 'computes' a sequence: what is stored for a token is the token."""
    slot, reused = cache.allocate(tokens, key)
    cache.extend(slot, tokens[reused:])
    cache.data[0, slot, reused : len(tokens), 0] = torch.tensor(tokens[reused:], dtype=torch.float32)
    return slot, reused


def held(cache: KVCache, slot: int) -> list[int]:
    return cache.data[0, slot, : cache.tokens_in(slot), 0].int().tolist()


def test_a_common_prefix_is_taken_from_live_and_retired_slots() -> None:
    cache = cache_of(8192)
    shared = list(range(100))
    first, reused = fill(cache, [*shared, 7])
    assert reused == 0
    second, reused = fill(cache, [*shared, 8, 9])
    assert (second != first, reused) == (True, 100)
    cache.free(first)
    cache.free(second)
    third, reused = fill(cache, [*shared, 8, 9, 10])
    assert (third, reused) == (second, 102)
    assert held(cache, third) == [*shared, 8, 9, 10]


def test_the_last_token_is_always_computed() -> None:
    cache = cache_of(4096)
    fill(cache, [1, 2, 3])
    assert fill(cache, [1, 2, 3])[1] == 2


def test_another_adapters_tokens_are_not_reused() -> None:
    cache = cache_of(4096)
    fill(cache, [1, 2, 3], "a@1")
    assert fill(cache, [1, 2, 3], "a@2")[1] == 0


def test_forgotten_tokens_are_not_reused() -> None:
    cache = cache_of(4096)
    slot, _ = fill(cache, [1, 2, 3], "a")
    cache.free(slot)
    cache.forget("a")
    assert fill(cache, [1, 2, 3], "a")[1] == 0


def test_the_least_recently_used_slot_goes_first() -> None:
    cache = cache_of(512 * 2, max_slots=2)
    for start in (0, 100):
        cache.free(fill(cache, [start, start + 1, start + 2])[0])
    cache.free(fill(cache, [0, 1, 2, 3])[0])
    fill(cache, [200, 201])
    assert fill(cache, [0, 1, 2, 9])[1] == 3


def test_a_full_cache_says_so_and_growth_keeps_what_is_there() -> None:
    cache = cache_of(600)
    slot, _ = fill(cache, list(range(200)))
    other, _ = fill(cache, list(range(1000, 1100)))
    assert held(cache, slot) == list(range(200))
    with pytest.raises(ResourceExhausted):
        cache.extend(other, list(range(500)))
    assert held(cache, other) == list(range(1000, 1100))
    cache.free(slot)
    assert cache.nbytes <= 4 * 600
    assert not cache.data[0, other, 100:].any()


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.booleans()), max_size=30))
def test_slots_always_hold_their_own_tokens(work: list[tuple[list[int], bool]]) -> None:
    cache = cache_of(300, max_length=64, max_slots=6)
    live: dict[int, list[int]] = {}
    for tokens, keep in work:
        try:
            slot, _ = fill(cache, tokens)
        except ResourceExhausted:
            assert live
            continue
        assert slot not in live
        if keep and len(live) < 3:
            live[slot] = tokens
        else:
            assert held(cache, slot) == tokens
            cache.free(slot)
        for own, expected in live.items():
            assert held(cache, own) == expected


@given(
    st.lists(st.integers(0, 1), max_size=200), st.lists(st.integers(0, 1), max_size=200), st.integers(0, 150)
)
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    shared = [1, 0] * n
    found = common_prefix(shared + a, shared + b)
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert found == len(shared) + expected
