"""Attention for serving: over the KV cache, any number of sequences in a pass, each at a place of its own.

Scores and softmax are fp32, as in training (attention.py). What does not depend on the layer's numbers (places, masks,
views of the cache) is made once a pass: at 8 sequences a layer of a small model takes as long as thirty Python calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.attention import QUERY_BLOCK, first_seen
from lathe.engine.kv import KVCache
from lathe.engine.rope import Rope
from lathe.engine.spec import DecoderSpec

# A block of prompts' queries holds about this many, so that what lies above the diagonal is mostly not computed.
_BLOCK_ROWS = 512
_SHORTEST_BLOCK = 64
# Sequences are padded to each other as long as their scores get no larger than by this factor.
_PADDING = 2.0
# Of a cached key or value: far beyond any that a model means, and its products with others stay finite.
_LARGEST = 1e18


@dataclass(frozen=True, slots=True)
class CachedSpan:
    """Tokens start:stop of a flat pass belong to one sequence: its KV slot, and its tokens before this pass."""

    start: int
    stop: int
    slot: int
    past: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def seen(self) -> int:
        """Tokens that its last one sees."""
        return self.past + self.count


class CachedAttention:
    """Writes the pass's keys and values into the cache, then attends over each sequence's own.

    Sequences of about the same length are done together, those that bring one token (decoding) and prompts apart: the
    former over the range of slots they lie in or over copies of theirs, the latter padded to the longest.
    """

    def __init__(
        self, spec: DecoderSpec, ropes: Sequence[Rope], spans: Sequence[CachedSpan], cache: KVCache
    ) -> None:
        self._spec, self._ropes = spec, ropes
        self._width = 2 * spec.kv_size
        places: list[int] = []
        for span in spans:
            first = span.slot * cache.length + span.past
            places.extend(range(first, first + span.count))
        self._places = torch.tensor(places, device=cache.data.device)
        self._pool = cache.data.view(spec.layers, -1, self._width).unbind(0)
        single = [span for span in spans if span.count == 1]
        prompts = [span for span in spans if span.count > 1]
        views = {window: _Seen(cache, spec, window) for window in dict.fromkeys(spec.windows)}
        self._steps = {
            window: [_step(group, seen) for group in _alike(single)] for window, seen in views.items()
        }
        self._blocks = {window: list(_blocks(prompts, seen)) for window, seen in views.items()}

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv: [T, (heads + 2 kv_heads) * head_dim], rotated in place."""
        spec, window = self._spec, self._spec.windows[layer]
        heads, kv, d = spec.heads, spec.kv_heads, spec.head_dim
        self._ropes[layer].rotate_(qkv.view(-1, heads + 2 * kv, d)[:, : heads + kv])
        self._pool[layer].index_copy_(0, self._places, _bounded(qkv[:, heads * d :]))
        q = qkv[:, : heads * d]
        steps, blocks = self._steps[window], self._blocks[window]
        if len(steps) == 1 and steps[0].rows is None and not blocks:
            return steps[0].attend(layer, q, spec)
        out = torch.empty((qkv.shape[0], heads * d), dtype=qkv.dtype, device=qkv.device)
        for step in steps:
            step.write(layer, q, out, spec)
        for block in blocks:
            block.write(layer, q, out, spec)
        return out


def _bounded(entries: Tensor) -> Tensor:
    """Keys and values as the cache may hold them: other sequences meet them masked, and neither -inf beside a score
    that is NaN or inf, nor 0 times such a value, hides anything."""
    most = min(_LARGEST, torch.finfo(entries.dtype).max)
    return entries.nan_to_num(nan=0.0, posinf=most, neginf=-most).clamp_(-most, most)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the layers with this window see of the cache."""

    cache: KVCache
    spec: DecoderSpec
    window: int | None

    @property
    def device(self) -> torch.device:
        return self.cache.data.device

    def first(self, place: int) -> int:
        """The first place that a token at this place sees."""
        return first_seen(place, self.window)

    def layers(self, slots: slice, first: int, stop: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views of every layer's keys and values in these slots and places: [slots, kv_heads, places, head_dim]."""
        layers, count, length, _ = self.cache.data.shape
        entries = self.cache.data.view(layers, count, length, 2, self.spec.kv_heads, self.spec.head_dim)
        keys, values = entries[:, slots, first:stop].permute(3, 0, 1, 4, 2, 5).unbind(0)
        return keys.unbind(0), values.unbind(0)

    def mask(self, places: Tensor, first: int, stop: int, dtype: torch.dtype) -> Tensor | None:
        """What tokens at `places` [sequences, queries] must not see of first … stop - 1, as -inf: [sequences, 1,
        queries, stop - first]. None where they see all of it."""
        keys = torch.arange(first, stop)
        hidden = keys > places[..., None]
        if self.window is not None:
            hidden |= keys <= places[..., None] - self.window
        if not hidden.any():
            return None
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return mask[:, None].to(self.device)


@dataclass(frozen=True, slots=True)
class _Step:
    """One query each of some sequences, the first rows of the pass unless `rows` names others.

    keys, values: by layer, [slots, kv_heads, places, head_dim]. slots: which of those to copy out, where the
    sequences' lie too far apart to go over all of them. rows, at: the queries' rows of the pass and their places among
    the slots. mask: [slots, 1, 1, places], None when all of it is seen.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    slots: Tensor | None
    mask: Tensor | None
    rows: Tensor | None
    at: Tensor | None

    def write(self, layer: int, q: Tensor, out: Tensor, spec: DecoderSpec) -> None:
        slots = self.keys[layer].shape[0] if self.slots is None else self.slots.shape[0]
        if self.rows is None or self.at is None:
            out[:slots] = self.attend(layer, q[:slots], spec)
            return
        queries = q.new_zeros((slots, q.shape[1]))
        queries.index_copy_(0, self.at, q.index_select(0, self.rows))
        out.index_copy_(0, self.rows, self.attend(layer, queries, spec).index_select(0, self.at))

    def attend(self, layer: int, q: Tensor, spec: DecoderSpec) -> Tensor:
        """q [slots, heads * head_dim] -> [slots, heads * head_dim]."""
        grouped = q.view(q.shape[0], spec.kv_heads, -1, spec.head_dim)
        k, v = self.keys[layer], self.values[layer]
        if self.slots is not None:
            k, v = k.index_select(0, self.slots), v.index_select(0, self.slots)
        o = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.mask, scale=spec.attention_scale)
        return o.reshape(q.shape)


def _step(spans: Sequence[CachedSpan], view: _Seen) -> _Step:
    spans = sorted(spans, key=lambda span: span.slot)
    low, high = spans[0].slot, spans[-1].slot + 1
    apart = high - low > 2 * len(spans)
    places_of = {i if apart else span.slot - low: span for i, span in enumerate(spans)}
    count = len(spans) if apart else high - low
    first, stop = min(view.first(span.past) for span in spans), max(span.seen for span in spans)
    # A slot of the range that is not in the pass sees everything: a row of nothing but -inf would be NaN.
    places = torch.tensor([[places_of[i].past if i in places_of else stop - 1] for i in range(count)])
    rows = [(span.start, i) for i, span in places_of.items()]
    # One-token rows that come first and in the order of adjoining slots need not be gathered and put back.
    straight = rows == [(i, i) for i in range(count)]
    gathered = (None, None) if straight else torch.tensor(rows, device=view.device).unbind(1)
    keys, values = view.layers(slice(None) if apart else slice(low, high), first, stop)
    slots = torch.tensor([span.slot for span in spans], device=view.device) if apart else None
    return _Step(keys, values, slots, view.mask(places, first, stop, view.cache.data.dtype), *gathered)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of prompts of about the same length, padded to each other.

    A query beyond its prompt's end stands for the last one again, so that it writes the same numbers once more. rows:
    the queries' rows of the pass, [prompts * queries]. slots: the prompts' in the cache. keys, values: by layer,
    [all slots, kv_heads, places, head_dim]. mask [prompts, 1, queries, places], in fp32 at least.
    """

    rows: Tensor
    slots: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None

    def write(self, layer: int, q: Tensor, out: Tensor, spec: DecoderSpec) -> None:
        n, kv, d = self.slots.shape[0], spec.kv_heads, spec.head_dim
        wide = torch.promote_types(q.dtype, torch.float32)
        # Heads that share keys are one product: [prompts * kv_heads, group * queries, head_dim].
        grouped = q.index_select(0, self.rows).view(n, -1, kv, spec.heads // kv, d).permute(0, 2, 3, 1, 4)
        queries = grouped.reshape(n * kv, -1, d).to(wide).mul_(spec.attention_scale)
        k = self.keys[layer].index_select(0, self.slots).view(n * kv, -1, d)
        v = self.values[layer].index_select(0, self.slots).view(n * kv, -1, d)
        scores = torch.bmm(queries, k.to(wide).transpose(1, 2))
        if self.mask is not None:
            scores.view(n, spec.heads, *self.mask.shape[2:]).add_(self.mask)
        p = torch.softmax(scores, -1).to(q.dtype)
        o = torch.bmm(p, v).view(grouped.shape).permute(0, 3, 1, 2, 4)
        out.index_copy_(0, self.rows, o.reshape(-1, q.shape[1]))


def _blocks(prompts: Sequence[CachedSpan], view: _Seen) -> Iterator[_Block]:
    for group in _alike(prompts):
        size = min(max(_BLOCK_ROWS // len(group), _SHORTEST_BLOCK), QUERY_BLOCK)
        for start in range(0, max(span.count for span in group), size):
            yield _block([span for span in group if span.count > start], start, start + size, view)


def _alike(spans: Sequence[CachedSpan]) -> Iterator[list[CachedSpan]]:
    """Groups whose scores, padded to the largest of the group, take at most _PADDING times their own room."""
    group: list[CachedSpan] = []
    for span in sorted(spans, key=lambda span: (span.count, span.seen)):
        longer = [*group, span]
        padded = len(longer) * max(one.count for one in longer) * max(one.seen for one in longer)
        if group and padded > _PADDING * sum(one.count * one.seen for one in longer):
            yield group
            longer = [span]
        group = longer
    if group:
        yield group


def _block(spans: Sequence[CachedSpan], start: int, stop: int, view: _Seen) -> _Block:
    """The queries start … stop - 1 of each of these prompts, which all have the first of them."""
    counts = torch.tensor([span.count for span in spans])[:, None]
    offsets = torch.arange(start, min(stop, int(counts.max()))).expand(len(spans), -1).minimum(counts - 1)
    rows = offsets + torch.tensor([span.start for span in spans])[:, None]
    places = offsets + torch.tensor([span.past for span in spans])[:, None]
    first, end = view.first(int(places.min())), int(places.max()) + 1
    keys, values = view.layers(slice(None), first, end)
    wide = torch.promote_types(view.cache.data.dtype, torch.float32)
    return _Block(
        rows.flatten().to(view.device),
        torch.tensor([span.slot for span in spans], device=view.device),
        keys,
        values,
        view.mask(places, first, end, wide),
    )
