"""Attention within the rows of a pass: training, and scoring without a cache (serving's is cached_attention.py).

Either takes the fused, not yet rotated q, k, v of flat tokens and gives the heads' outputs of flat tokens; everything
else in the decoder works on flat tokens. Scores and softmax are fp32. In a layer with a sliding window a token sees
the window's last tokens, itself included.

On a CPU training does not use torch's flash kernel: at 8 rows of 100 tokens in bfloat16 it took 3.2 + 17.3 ms a
layer (forward, backward) where plain batched products took about 1.5 + 1.5 (measured, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.rope import Rope
from lathe.engine.spec import DecoderSpec
from lathe.engine.untyped import applied

# Queries are taken in blocks of this many, each against the keys up to its end: bounds memory, skips most of
# the upper triangle. Rows within one block keep their probabilities for the backward pass.
QUERY_BLOCK = 256


class Attention(Protocol):
    """One pass's attention. qkv: [T, (heads + 2 kv_heads) * head_dim]; answers [T, heads * head_dim]."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor: ...


class RowAttention:
    """Causal attention within each row of a flat batch (training, and scoring without a cache).

    Rows are padded on the right for attention alone: a causal mask keeps padding from every real token.
    fused: this module's own blocks; else torch's scaled_dot_product_attention (the choice on a GPU).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        ropes: Sequence[Rope],
        lengths: Sequence[int],
        device: torch.device,
        *,
        fused: bool,
    ) -> None:
        self._spec, self._ropes, self._fused = spec, ropes, fused
        self._rows, self._length = len(lengths), max(lengths)
        self._device = device
        self._bands: dict[int, Tensor] = {}
        self._pad: Tensor | None = None
        self._unpad: Tensor | None = None
        if min(lengths) != self._length:
            counts = torch.tensor(list(lengths), device=device)
            starts = counts.cumsum(0) - counts
            places = torch.arange(self._length, device=device)
            inside = places < counts[:, None]
            self._pad = torch.where(inside, starts[:, None] + places, 0).flatten()
            self._unpad = inside.flatten().nonzero().flatten()

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        if not self._fused:
            return self._sdpa(layer, qkv)
        if qkv.requires_grad:
            return applied(_RowAttention, qkv, self, layer)
        return self.forward(layer, qkv)[0]

    def _split(self, layer: int, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated, padded q [n kv, g, L, d] and k, v [n kv, L, d]."""
        spec = self._spec
        heads, kv, d = spec.heads, spec.kv_heads, spec.head_dim
        x = qkv.view(-1, heads + 2 * kv, d)
        qk = self._padded(self._ropes[layer].rotate(x[:, : heads + kv]))
        v = self._padded(x[:, heads + kv :])
        n, length = self._rows, self._length
        q = qk[:, :heads].view(n, length, kv, heads // kv, d).permute(0, 2, 3, 1, 4)
        k = qk[:, heads:].view(n, length, kv, d).transpose(1, 2)
        v = v.view(n, length, kv, d).transpose(1, 2)
        return q.reshape(n * kv, -1, length, d), k.reshape(n * kv, length, d), v.reshape(n * kv, length, d)

    def _padded(self, x: Tensor) -> Tensor:
        return x.contiguous() if self._pad is None else x.index_select(0, self._pad)

    def _flat(self, x: Tensor) -> Tensor:
        return x if self._unpad is None else x.index_select(0, self._unpad)

    def _merge(self, o: Tensor) -> Tensor:
        """[n kv, g, L, d] -> flat [T, heads * d]."""
        kv, g, length, d = self._spec.kv_heads, o.shape[1], self._length, o.shape[3]
        x = o.view(self._rows, kv, g, length, d).permute(0, 3, 1, 2, 4)
        return self._flat(x.reshape(self._rows * length, kv * g * d))

    def forward(self, layer: int, qkv: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output and what the backward pass needs: q, k, v and, for short rows, the probabilities."""
        q, k, v = self._split(layer, qkv)
        out = torch.empty_like(q)
        probabilities: list[Tensor] = []
        for start, stop, low in self._blocks(layer):
            p = self._attend(layer, q[:, :, start:stop], k[:, low:stop], start - low)
            out[:, :, start:stop] = torch.bmm(p, v[:, low:stop]).view(out[:, :, start:stop].shape)
            if self._length <= QUERY_BLOCK:
                probabilities.append(p)
        return self._merge(out), [q, k, v, *probabilities]

    def _blocks(self, layer: int) -> Iterator[tuple[int, int, int]]:
        """Blocks of queries start:stop, each with the first key that any of them sees."""
        for start in range(0, self._length, QUERY_BLOCK):
            low = first_seen(start, self._spec.windows[layer])
            yield start, min(start + QUERY_BLOCK, self._length), low

    def _attend(self, layer: int, q: Tensor, k: Tensor, past: int) -> Tensor:
        return attend(q, k, past, scale=self._spec.attention_scale, window=self._spec.windows[layer])

    def backward(
        self, layer: int, do: Tensor, q: Tensor, k: Tensor, v: Tensor, *probabilities: Tensor
    ) -> Tensor:
        """d out [T, heads * d] -> d qkv, flat."""
        spec, n, length = self._spec, self._rows, self._length
        heads, kv, d = spec.heads, spec.kv_heads, spec.head_dim
        o = self._padded_gradient(do).view(n, length, kv, heads // kv, d).permute(0, 2, 3, 1, 4)
        o = o.reshape(n * kv, -1, length, d)
        dq = torch.empty_like(q)
        dk = torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        dv = torch.zeros_like(dk)
        for start, stop, low in self._blocks(layer):
            if probabilities:
                p = probabilities[0]
            else:
                p = self._attend(layer, q[:, :, start:stop], k[:, low:stop], start - low)
            o_block = o[:, :, start:stop].reshape(n * kv, -1, d)
            dv[:, low:stop] += torch.bmm(p.transpose(1, 2), o_block)
            dp = torch.bmm(o_block, v[:, low:stop].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, start:stop] = torch.bmm(ds, k[:, low:stop]).view(dq[:, :, start:stop].shape)
            dk[:, low:stop] += torch.bmm(ds.transpose(1, 2), q[:, :, start:stop].reshape(n * kv, -1, d))
        scale = spec.attention_scale
        dqk = torch.empty((n, length, heads + kv, d), dtype=do.dtype, device=do.device)
        torch.mul(
            dq.view(n, kv, -1, length, d).permute(0, 3, 1, 2, 4),
            scale,
            out=dqk[:, :, :heads].view(n, length, kv, -1, d),
        )
        dqk[:, :, heads:] = dk.mul_(scale).view(n, kv, length, d).transpose(1, 2)
        dv_flat = self._flat(dv.view(n, kv, length, d).transpose(1, 2).reshape(n * length, kv, d)).to(
            do.dtype
        )
        rotated = self._ropes[layer].unrotate(self._flat(dqk.view(n * length, heads + kv, d)))
        return torch.cat((rotated, dv_flat), dim=1).view(do.shape[0], -1)

    def _padded_gradient(self, do: Tensor) -> Tensor:
        if self._unpad is None:
            return do
        padded = do.new_zeros((self._rows * self._length, do.shape[1]))
        return padded.index_copy_(0, self._unpad, do)

    def _sdpa(self, layer: int, qkv: Tensor) -> Tensor:
        spec, n, length = self._spec, self._rows, self._length
        heads, kv, d = spec.heads, spec.kv_heads, spec.head_dim
        q, k, v = self._split(layer, qkv)
        q, k, v = q.reshape(n, heads, length, d), k.view(n, kv, length, d), v.view(n, kv, length, d)
        window, scale = spec.windows[layer], spec.attention_scale
        if window is None or window >= length:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            # On CUDA no kernel takes a mask together with grouped heads but the one that keeps all the scores.
            k, v = (x.repeat_interleave(heads // kv, dim=1) for x in (k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=self._band(window), scale=scale)
        return self._merge(o.reshape(n * kv, -1, length, d))

    def _band(self, window: int) -> Tensor:
        """Which keys [length] each query [length] sees in a layer with this window; made once a pass."""
        if window not in self._bands:
            seen = torch.ones((self._length, self._length), dtype=torch.bool, device=self._device)
            self._bands[window] = seen.tril_().triu_(1 - window)
        return self._bands[window]


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, attention: RowAttention, layer: int) -> Tensor:
        out, saved = attention.forward(layer, qkv)
        ctx.save_for_backward(*saved)
        ctx.attention, ctx.layer = attention, layer
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.attention.backward(ctx.layer, do.contiguous(), *ctx.saved_tensors), None, None


def first_seen(place: int, window: int | None) -> int:
    """The first place that a token at this place sees."""
    return 0 if window is None else max(0, place - window + 1)


def attend(q: Tensor, k: Tensor, past: int, *, scale: float, window: int | None) -> Tensor:
    """Probabilities [b, g m, n] of queries [b, g, m, d] at places past … past + m - 1 over keys [b, n, d].

    The keys begin at the first that the first query sees. In the queries' dtype; scores (an fp32 product) and
    softmax in fp32 (in fp64 for fp64).
    """
    b, g, m, d = q.shape
    n, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.reshape(b, g * m, d).to(wide) * scale, k.to(wide).transpose(1, 2))
    if m > 1:
        hidden = torch.full((m, n), float("-inf"), dtype=wide, device=q.device)
        mask = hidden.triu(past + 1)
        if window is not None and n > window:
            mask += hidden.tril_(past - window)
        scores.view(b, g, m, n).add_(mask)
    return torch.softmax(scores, -1).to(q.dtype)
