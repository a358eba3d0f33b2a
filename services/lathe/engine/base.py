"""The decoder: one forward pass for training and serving, over flat tokens.

It is one program for every family; what differs is data: the spec's numbers, and which norms a layer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.engine.activations import activate
from lathe.engine.attention import Attention, RowAttention
from lathe.engine.bank import AdapterBank, LoraPass
from lathe.engine.cached_attention import CachedAttention, CachedSpan
from lathe.engine.frozen import Frozen
from lathe.engine.kv import KVCache
from lathe.engine.lora import Head, embed, linear
from lathe.engine.lora_layout import EMBEDDING, HEAD, GroupKey
from lathe.engine.norms import Norm
from lathe.engine.parts import ALWAYS_THERE, Parts
from lathe.engine.rope import Rope, RopeTables
from lathe.engine.spec import DecoderSpec


@dataclass(slots=True)
class LayerNorms:
    """The norms of a layer, by role; which of them are there says how the layer is built.

    input: before attention. mlp: before the MLP; without one attention and MLP run side by side on the input norm
    (Phi-2). attention_out, mlp_out: of what is added to the residual (Gemma 3). q, k: over each head (Qwen3, Gemma 3).
    """

    input: Norm
    mlp: Norm | None = None
    attention_out: Norm | None = None
    mlp_out: Norm | None = None
    q: Norm | None = None
    k: Norm | None = None

    @property
    def nbytes(self) -> int:
        norms = (self.input, self.mlp, self.attention_out, self.mlp_out, self.q, self.k)
        return sum(norm.nbytes for norm in norms if norm is not None)


@dataclass(slots=True)
class LayerWeights:
    """One layer; q, k, v and gate, up are fused along their outputs (without a gate, gate_up is the MLP's first)."""

    norms: LayerNorms
    qkv: Frozen
    o: Frozen
    gate_up: Frozen
    down: Frozen


@dataclass(slots=True)
class Weights:
    """table [vocab, hidden]: the embeddings; may be the head too. embeddings_gradient: where their gradient is added,
    when they are trained (see full.py). parts: what must be said before a part is used."""

    table: Frozen
    layers: list[LayerWeights]
    final_norm: Norm
    head: Frozen
    embeddings_gradient: Tensor | None = None
    parts: Parts = ALWAYS_THERE

    @property
    def embeddings(self) -> Tensor:
        """The table as a tensor."""
        return self.table.dense()

    @property
    def linears(self) -> list[Frozen]:
        """The fused linears of all layers, and the head."""
        return [*(part for w in self.layers for part in (w.qkv, w.o, w.gate_up, w.down)), self.head]

    @property
    def nbytes(self) -> int:
        norms = self.final_norm.nbytes + sum(w.norms.nbytes for w in self.layers)
        linears = {id(part): part for part in (self.table, *self.linears)}
        return norms + sum(part.nbytes for part in linears.values())

    def linear(self, key: GroupKey) -> Frozen:
        """A fused linear by (layer, name), or the head."""
        if key == HEAD:
            return self.head
        found: Frozen = getattr(self.layers[key[0]], key[1])
        return found


class Decoder:
    """A frozen base model. device and dtype are those of its weights."""

    def __init__(self, spec: DecoderSpec, weights: Weights, *, fused_attention: bool | None = None) -> None:
        self.spec = spec
        self.weights = weights
        self.device, self.dtype = weights.embeddings.device, weights.embeddings.dtype
        self._fused = self.device.type == "cpu" if fused_attention is None else fused_attention
        self._ropes = {rope: RopeTables(rope, self.device, self.dtype) for rope in dict.fromkeys(spec.ropes)}
        # As transformers keeps it: rounded to the weights' type.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale).to(self.dtype))

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
        reach: Sequence[int] | None = None,
        training: bool = False,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] after the last norm, of flat tokens.

        tokens, positions: [T] int64; lengths: tokens of each sequence in order; slots: each one's adapter in
        `bank`, -1 for the base. Without a cache each sequence is a whole row. With one, `kv_slots` and `past` say
        where each sequence lies and how many tokens it has there already; their keys and values are written.
        reach: tokens of each whole sequence as far as known, when this pass does not end it (see RopeTables.at).
        training: record a graph through which LoRA's gradients are added to the adapters' buffers; `rows` are then
        the sequences' identities, for dropout (see bank.row_identity).
        """
        if training != torch.is_grad_enabled():
            raise ValueError("a training pass needs gradients enabled, any other needs them disabled")
        lora = bank.plan(slots, lengths, training=training, rows=rows)
        attention = self._attention(
            positions, lengths, cache=cache, kv_slots=kv_slots, past=past, reach=reach
        )
        h = self._embed(tokens, lora)
        parts = self.weights.parts
        for i, w in enumerate(self.weights.layers):
            parts.take(i)
            x = w.norms.input(h)
            qkv = self._normalise_heads(linear(x, w.qkv, lora, (i, "qkv")), w.norms)
            h = _add(h, attention(i, qkv), w.o, lora, (i, "o"), norm=w.norms.attention_out)
            if w.norms.mlp is not None:
                x = w.norms.mlp(h)
            inner = linear(x, w.gate_up, lora, (i, "gate_up"))
            inner = activate(inner, self.spec.activation, gated=self.spec.gated)
            h = parts.again(i, _add(h, inner, w.down, lora, (i, "down"), norm=w.norms.mlp_out))
        return self.weights.final_norm(h)

    def head(self, lora: LoraPass | None = None) -> Head:
        """The output head; lora: that of the rows which will go through it (AdapterBank.plan_head)."""
        self.weights.parts.take(HEAD)
        return Head(self.weights.head, lora)

    def logits(self, hidden: Tensor, lora: LoraPass | None = None) -> Tensor:
        """The head on chosen rows: [n, hidden] -> [n, vocab] in fp32 (no gradient; see losses for training)."""
        return self.head(lora).forward(hidden).float()

    def _embed(self, tokens: Tensor, lora: LoraPass) -> Tensor:
        self.weights.parts.take(EMBEDDING)
        h = embed(tokens, self.weights.embeddings, lora, self.weights.embeddings_gradient)
        return h if self._embedding_scale == 1 else h * self._embedding_scale

    def _normalise_heads(self, qkv: Tensor, norms: LayerNorms) -> Tensor:
        if norms.q is None or norms.k is None:
            return qkv
        x = qkv.view(qkv.shape[0], -1, self.spec.head_dim)
        heads, keys = self.spec.heads, self.spec.heads + self.spec.kv_heads
        q, k, v = x[:, :heads], x[:, heads:keys], x[:, keys:]
        return torch.cat((norms.q(q), norms.k(k), v), dim=1).view(qkv.shape)

    def _attention(
        self,
        positions: Tensor,
        lengths: Sequence[int],
        *,
        cache: KVCache | None,
        kv_slots: Sequence[int] | None,
        past: Sequence[int] | None,
        reach: Sequence[int] | None,
    ) -> Attention:
        before = [0] * len(lengths) if past is None else past
        reach = reach or [n + done for n, done in zip(lengths, before, strict=True)]
        tables = {rope: made.at(positions, lengths, reach) for rope, made in self._ropes.items()}
        ropes: list[Rope] = [tables[rope] for rope in self.spec.ropes]
        if cache is None:
            return RowAttention(self.spec, ropes, lengths, self.device, fused=self._fused)
        if kv_slots is None or past is None:
            raise ValueError("a pass with a cache needs kv_slots and past")
        spans: list[CachedSpan] = []
        start = 0
        for length, slot, done in zip(lengths, kv_slots, past, strict=True):
            spans.append(CachedSpan(start, start + length, slot, done))
            start += length
        return CachedAttention(self.spec, ropes, spans, cache)


def _add(h: Tensor, x: Tensor, base: Frozen, lora: LoraPass, key: GroupKey, *, norm: Norm | None) -> Tensor:
    """The residual h plus the linear of x, normalised first where the family does."""
    if norm is None:
        return linear(x, base, lora, key, residual=h)
    return h + norm(linear(x, base, lora, key))
