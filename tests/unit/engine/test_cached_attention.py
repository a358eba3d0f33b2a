"""Attention over the cache beside the plain formula, for any mixture of prompts and decoding sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lathe.engine import cached_attention
from lathe.engine.cached_attention import CachedAttention, CachedSpan
from lathe.engine.kv import KVCache
from lathe.engine.rope import RopeTables
from lathe.engine.spec import DecoderSpec
from tests.unit.engine.conftest import CONFIG

WINDOWS = (None, 5)
SPEC = replace(DecoderSpec.from_config({**CONFIG, "num_hidden_layers": len(WINDOWS)}), windows=WINDOWS)
LENGTH = 64

# (tokens before the pass, tokens in it) of each sequence; its slot is its number, with gaps.
spans_of_a_pass = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(2, 24))), min_size=1, max_size=7
)


@settings(max_examples=40, deadline=None)
@given(shape=spans_of_a_pass, gap=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_token_sees_its_own_sequence(shape: list[tuple[int, int]], gap: int, seed: int) -> None:
    _check(shape, gap, seed)


def test_prompts_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_attention, "_BLOCK_ROWS", 12)
    monkeypatch.setattr(cached_attention, "_SHORTEST_BLOCK", 4)
    _check([(0, 21), (3, 18), (0, 24), (9, 1), (30, 2)], gap=1, seed=0)


def _check(shape: Sequence[tuple[int, int]], gap: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, spans = _cache_of(shape, gap, generator)
    total = spans[-1].stop
    positions = torch.cat([torch.arange(past, past + count) for past, count in shape])
    counts, seen = [span.count for span in spans], [span.seen for span in spans]
    rope = RopeTables(SPEC.ropes[0], torch.device("cpu"), torch.float64).at(positions, counts, seen)
    attention = CachedAttention(SPEC, [rope] * SPEC.layers, spans, cache)
    for layer, window in enumerate(WINDOWS):
        width = SPEC.q_size + 2 * SPEC.kv_size
        qkv = torch.randn((total, width), generator=generator, dtype=torch.float64)
        rotated = qkv.view(total, -1, SPEC.head_dim).clone()
        turning = SPEC.heads + SPEC.kv_heads
        rotated[:, :turning] = rope.rotate(rotated[:, :turning])
        before = cache.data[layer].clone()
        got = attention(layer, qkv.clone())
        for span in spans:
            mine = rotated[span.start : span.stop].flatten(1)
            held = torch.cat((before[span.slot, : span.past], mine[:, SPEC.q_size :]))
            assert torch.equal(cache.data[layer, span.slot, : span.seen], held)
            want = _plain(mine[:, : SPEC.q_size], held, window)
            torch.testing.assert_close(got[span.start : span.stop], want, rtol=0, atol=1e-12)


def _cache_of(
    shape: Sequence[tuple[int, int]], gap: int, generator: torch.Generator
) -> tuple[KVCache, list[CachedSpan]]:
    """A cache in which each sequence has its earlier tokens, in every gap-th slot."""
    width = 2 * SPEC.kv_size
    cache = KVCache(
        layers=SPEC.layers, width=width, max_length=LENGTH, budget_bytes=1 << 24, dtype=torch.float64,
        device=torch.device("cpu"),
    )  # fmt: skip
    slots = [cache.allocate([number], str(number))[0] for number in range(gap * len(shape))][::gap]
    # A slot's longest place decides the pool's length.
    cache.extend(slots[0], [0] * (LENGTH - 1))
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator, dtype=torch.float64))
    spans, start = [], 0
    for slot, (past, count) in zip(slots, shape, strict=True):
        spans.append(CachedSpan(start, start + count, slot, past))
        start += count
    return cache, spans


def _plain(q: Tensor, held: Tensor, window: int | None) -> Tensor:
    """Softmax attention of the last tokens of one sequence over all of it, head by head."""
    count, seen = q.shape[0], held.shape[0]
    k, v = held.view(seen, 2, SPEC.kv_heads, SPEC.head_dim).unbind(1)
    out = []
    for head in range(SPEC.heads):
        shared = head // (SPEC.heads // SPEC.kv_heads)
        scores = q.view(count, SPEC.heads, -1)[:, head] @ k[:, shared].T * SPEC.attention_scale
        for i in range(count):
            place = seen - count + i
            scores[i, place + 1 :] = float("-inf")
            if window is not None:
                scores[i, : max(0, place - window + 1)] = float("-inf")
        out.append(torch.softmax(scores, -1) @ v[:, shared])
    return torch.cat(out, dim=1)
