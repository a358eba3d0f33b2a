"""The decoder: one forward pass for training and serving, over flat tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.adapters import AdapterBank
from lathe.engine.attention import Attention, CachedAttention, CachedSpan, Rope, RowAttention
from lathe.engine.frozen import FrozenLinear
from lathe.engine.kernels import linear, rms_norm, swiglu
from lathe.engine.kv import KVCache
from lathe.engine.spec import DecoderSpec, RopeSpec


@dataclass(slots=True)
class LayerWeights:
    """One layer; q, k, v and gate, up are fused along their outputs. Norm weights in the compute dtype."""

    input_norm: Tensor
    qkv: FrozenLinear
    o: FrozenLinear
    post_norm: Tensor
    gate_up: FrozenLinear
    down: FrozenLinear


@dataclass(slots=True)
class Weights:
    embeddings: Tensor  # [vocab, hidden]
    layers: list[LayerWeights]
    final_norm: Tensor
    head: FrozenLinear

    @property
    def nbytes(self) -> int:
        linears = [part for w in self.layers for part in (w.qkv, w.o, w.gate_up, w.down)]
        norms = self.final_norm.nbytes * (2 * len(self.layers) + 1)
        return self.embeddings.nbytes + norms + sum(part.nbytes for part in (*linears, self.head))


class Decoder:
    """A frozen base model. device and dtype are those of its weights."""

    def __init__(self, spec: DecoderSpec, weights: Weights, *, fused_attention: bool | None = None) -> None:
        self.spec = spec
        self.weights = weights
        self.device, self.dtype = weights.embeddings.device, weights.embeddings.dtype
        self._fused = self.device.type == "cpu" if fused_attention is None else fused_attention
        self._frequencies = rope_frequencies(spec.rope, spec.head_dim).to(self.device)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        slots: Sequence[int],
        bank: AdapterBank,
        *,
        cache: KVCache | None = None,
        kv_slots: Sequence[int] | None = None,
        past: Sequence[int] | None = None,
        training: bool = False,
    ) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of flat tokens.

        tokens, positions: [T] int64; lengths: tokens of each sequence in order; slots: each one's adapter in
        `bank`, -1 for the base. Without a cache each sequence is a whole row. With one, `kv_slots` and `past` say
        where each sequence lies and how many tokens it has there already; their keys and values are written.
        training: record a graph through which LoRA's gradients are added to the adapters' buffers.
        """
        if training != torch.is_grad_enabled():
            raise ValueError("a training pass needs gradients enabled, any other needs them disabled")
        lora = bank.plan(slots, lengths, training=training)
        attention = self._attention(positions, lengths, cache, kv_slots, past)
        eps = self.spec.norm_eps
        h = F.embedding(tokens, self.weights.embeddings)
        for i, w in enumerate(self.weights.layers):
            x = rms_norm(h, w.input_norm, eps)
            o = attention(i, linear(x, w.qkv, lora, (i, "qkv")))
            h = linear(o, w.o, lora, (i, "o"), residual=h)
            x = rms_norm(h, w.post_norm, eps)
            a = swiglu(linear(x, w.gate_up, lora, (i, "gate_up")))
            h = linear(a, w.down, lora, (i, "down"), residual=h)
        return rms_norm(h, self.weights.final_norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on chosen rows: [n, hidden] -> [n, vocab] in fp32 (no gradient; see losses for training)."""
        return self.weights.head.forward(hidden).float()

    def rope(self, positions: Tensor) -> Rope:
        """cos and sin tables; the first half of sin is negated so that rotation is x cos + roll(x) sin."""
        angles = positions[:, None].float() * self._frequencies[None, :]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return Rope(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])

    def _attention(
        self,
        positions: Tensor,
        lengths: Sequence[int],
        cache: KVCache | None,
        kv_slots: Sequence[int] | None,
        past: Sequence[int] | None,
    ) -> Attention:
        rope = self.rope(positions)
        if cache is None:
            return RowAttention(self.spec, rope, lengths, self.device, fused=self._fused)
        if kv_slots is None or past is None:
            raise ValueError("a pass with a cache needs kv_slots and past")
        spans: list[CachedSpan] = []
        start = 0
        for length, slot, before in zip(lengths, kv_slots, past, strict=True):
            spans.append(CachedSpan(start, start + length, slot, before))
            start += length
        return CachedAttention(self.spec, rope, spans, cache)


def rope_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Inverse frequencies [head_dim / 2]; "llama3" is the piecewise scaling of Llama 3.1's release."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind != "llama3":
        return inverse
    wavelength = 2 * math.pi / inverse
    low, high = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(wavelength > low, inverse / rope.factor, inverse)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)
