"""LoRA on the frozen base: a linear, the embeddings and the head, forward and backward, grouped by adapter.

None of them keeps a gradient for a base weight. A plain linear saves its input and u = A x alone; DoRA saves its output
before the magnitude besides, dropout its masks. Gradients of A, B and m are added to the adapters' own buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine import lora_batched
from lathe.engine.adapters import LoraGroup
from lathe.engine.bank import LoraPass, MixedLora, Segment
from lathe.engine.dropout import keep_mask
from lathe.engine.frozen import Frozen
from lathe.engine.lora_layout import EMBEDDING, HEAD, GroupKey
from lathe.engine.trained import TrainedLinear
from lathe.engine.untyped import applied

# What the backward pass needs of a segment: u, v (DoRA's output before m / n, or None), masks (or None).
_Kept = tuple[Tensor, Tensor | None, Tensor | None]


def linear(x: Tensor, base: Frozen, lora: LoraPass, key: GroupKey, residual: Tensor | None = None) -> Tensor:
    """The base linear plus each segment's LoRA: [T, in] -> [T, out].

    key: (layer, name of the fused linear). `lora.anchor` carries requires_grad into the first layer, whose x
    needs no gradient of its own.
    """
    if lora.anchor is not None:
        return applied(_Linear, x, residual, lora.anchor, base, lora, key)
    if not lora.segments:
        return base.forward(x, residual)
    if lora.mixed is not None:
        return _mixed_forward(x, residual, base, lora.mixed, key)
    return _forward(x, residual, base, lora, key, keep=False)[0]


def embed(tokens: Tensor, table: Tensor, lora: LoraPass, gradient: Tensor | None = None) -> Tensor:
    """The rows of the embedding table [vocab, hidden] plus each segment's LoRA: [T] -> [T, hidden].

    gradient [vocab, hidden]: where that of the table itself is added, if it is trained.

    Unlike PEFT, whose embedding layer knows a padding token, it trains every token of a row: there is no padding, and
    many models name their end-of-turn token as the one to pad with.
    """
    trained = gradient is not None or any(True for _ in _parts(lora, EMBEDDING))
    if lora.anchor is not None and trained:
        return applied(_Embed, tokens, lora.anchor, table, gradient, lora)
    return _embed_forward(tokens, table, lora, keep=False)[0]


class Head:
    """The output head with the LoRA of the rows that go through it, any block of them at a time."""

    def __init__(self, base: Frozen, lora: LoraPass | None = None) -> None:
        """lora: of all the rows, as AdapterBank.plan_head makes it; None for the base alone."""
        self._base = base
        parts = [] if lora is None else list(_parts(lora, HEAD))
        self._parts = [(segment, part, _masks(segment, part, base)) for segment, part in parts]

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x [n, hidden], the rows from `start` on -> logits [n, vocab] in the compute dtype."""
        return self._run(x, start, keep=False)[0]

    def forward_kept(self, x: Tensor, start: int) -> tuple[Tensor, list[_Kept]]:
        """The same, and what `backward` wants to have back."""
        return self._run(x, start, keep=True)

    def backward(self, x: Tensor, start: int, kept: Sequence[_Kept], dy: Tensor) -> Tensor:
        """d logits -> dx, and LoRA's gradients into the adapters."""
        work = [
            (slice(low, high), part, one)
            for (low, high, part, _), one in zip(self._clipped(start, x.shape[0]), kept, strict=True)
        ]
        dx = _backward(self._base, work, x, dy, need_dx=True)
        assert dx is not None
        return dx

    def _run(self, x: Tensor, start: int, *, keep: bool) -> tuple[Tensor, list[_Kept]]:
        work = [
            (slice(low, high), part, masks) for low, high, part, masks in self._clipped(start, x.shape[0])
        ]
        return _run(x, None, self._base, work, keep=keep)

    def _clipped(self, start: int, count: int) -> Iterator[tuple[int, int, LoraGroup, Tensor | None]]:
        for segment, part, masks in self._parts:
            low, high = max(segment.start, start), min(segment.stop, start + count)
            if low < high:
                mine = None if masks is None else masks[:, low - segment.start : high - segment.start]
                yield low - start, high - start, part, mine


# Forward


def _parts(lora: LoraPass, key: GroupKey) -> Iterator[tuple[Segment, LoraGroup]]:
    for segment in lora.segments:
        part = segment.adapter.groups.get(key)
        if part is not None:
            yield segment, part


def _forward(
    x: Tensor, residual: Tensor | None, base: Frozen, lora: LoraPass, key: GroupKey, *, keep: bool
) -> tuple[Tensor, list[_Kept]]:
    work = [
        (slice(segment.start, segment.stop), part, _masks(segment, part, base))
        for segment, part in _parts(lora, key)
    ]
    return _run(x, residual, base, work, keep=keep)


def _run(
    x: Tensor,
    residual: Tensor | None,
    base: Frozen,
    work: Sequence[tuple[slice, LoraGroup, Tensor | None]],
    *,
    keep: bool,
) -> tuple[Tensor, list[_Kept]]:
    dora = any(part.gain is not None for _, part, _ in work)
    # m / n multiplies the product alone: bias and residual come after it.
    y = base.product(x) if dora else base.forward(x, residual)
    kept = [_segment_forward(x[rows], y[rows], part, masks, base, keep=keep) for rows, part, masks in work]
    if dora and base.bias is not None:
        y.add_(base.bias)
    if dora and residual is not None:
        y.add_(residual)
    return y, kept


def _segment_forward(
    x: Tensor, y: Tensor, part: LoraGroup, masks: Tensor | None, base: Frozen, *, keep: bool
) -> _Kept:
    """Adds the segment's LoRA to y (and applies DoRA's m / n)."""
    u = F.linear(x, part.a) if masks is None else _dropped_u(x, part, masks)
    _add_modules(y, u, part)
    if part.gain is None:
        return u, None, masks
    if masks is None:
        v = y.clone() if keep else y
    else:
        # As PEFT: the base's own product sees the dropped input where m / n - 1 multiplies it, and only there.
        v = torch.zeros_like(y)
        for mask, module in zip(masks, part.modules, strict=True):
            outputs = slice(module.out_start, module.out_stop)
            v[:, outputs] = base.product(_dropped(x, mask, part))[:, outputs]
        _add_modules(v, u, part)
    y.addcmul_(v, part.gain)
    return u, v, masks


def _add_modules(y: Tensor, u: Tensor, part: LoraGroup) -> None:
    # One small product a module: a block-diagonal B in one product was measured slower (185 against 129 us).
    for module in part.modules:
        y[:, module.out_start : module.out_stop].addmm_(u[:, module.r_start : module.r_stop], module.b.t())


def _dropped(x: Tensor, mask: Tensor, part: LoraGroup) -> Tensor:
    return (x * mask).mul_(part.dropout_scale)


def _dropped_u(x: Tensor, part: LoraGroup, masks: Tensor) -> Tensor:
    u = x.new_empty((x.shape[0], part.a.shape[0]))
    for mask, module in zip(masks, part.modules, strict=True):
        columns = slice(module.r_start, module.r_stop)
        torch.mm(x * mask, part.a[columns].t(), out=u[:, columns])
    return u.mul_(part.dropout_scale)


def _masks(segment: Segment, part: LoraGroup, base: Frozen) -> Tensor | None:
    """Dropout's masks of the segment, one a module: bool [modules, tokens, in]; None without dropout."""
    if not segment.rows:
        return None
    adapter = segment.adapter
    return torch.stack(
        [
            keep_mask(
                segment.rows,
                base.in_features,
                p=adapter.spec.lora_dropout,
                draw=(adapter.seed, adapter.steps, module.site.path),
                device=part.a.device,
            )
            for module in part.modules
        ]
    )


def _mixed_forward(
    x: Tensor, residual: Tensor | None, base: Frozen, mixed: MixedLora, key: GroupKey
) -> Tensor:
    both = mixed.groups.get(key)
    if both is None:
        return base.forward(x, residual)
    u, mask = both.a.forward(x), mixed.masks[both.pattern]
    if mask is not None:
        u.mul_(mask)
    if both.gains is None or mixed.owner is None:
        return both.b.forward(u, residual=base.forward(x, residual))
    y = both.b.forward(u, residual=base.product(x))
    y.addcmul_(y, both.gains.index_select(0, mixed.owner))
    if base.bias is not None:
        y.add_(base.bias)
    return y if residual is None else y.add_(residual)


# Backward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        anchor: Tensor,
        base: Frozen,
        lora: LoraPass,
        key: GroupKey,
    ) -> Tensor:
        ctx.base, ctx.lora, ctx.key, ctx.has_residual = base, lora, key, residual is not None
        ctx.batch = lora_batched.batched(lora.batch, [part for _, part in _parts(lora, key)])
        if ctx.batch is not None:
            y = base.forward(x, residual)
            one = lora_batched.forward(x, y, ctx.batch)
            ctx.save_for_backward(one.x, one.u, one.a, *one.b)
            return y
        y, kept = _forward(x, residual, base, lora, key, keep=True)
        ctx.save_for_backward(x, *(tensor for one in kept for tensor in one))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy.contiguous()
        need_dx = ctx.needs_input_grad[0]
        if ctx.batch is not None:
            x, u, a, *b = ctx.saved_tensors
            dx = ctx.base.backward(dy) if need_dx else None
            lora_batched.backward(lora_batched.Kept(x, u, a, b), ctx.batch, dy, dx)
        else:
            x, *flat = ctx.saved_tensors
            kept = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
            work = [
                (slice(segment.start, segment.stop), part, one)
                for (segment, part), one in zip(_parts(ctx.lora, ctx.key), kept, strict=True)
            ]
            dx = _backward(ctx.base, work, x, dy, need_dx=need_dx)
        return dx, dy if ctx.has_residual else None, None, None, None, None


def _backward(
    base: Frozen,
    work: Sequence[tuple[slice, LoraGroup, _Kept]],
    x: Tensor,
    dy: Tensor,
    *,
    need_dx: bool,
) -> Tensor | None:
    dz = _through_gain(work, dy)
    dx = base.backward(dz) if need_dx else None
    if isinstance(base, TrainedLinear):
        base.learn(x, dz)
    for rows, part, (u, v, masks) in work:
        if part.gain is not None and v is not None:
            _magnitude_backward(part, v, dy[rows])
        part_dx = None if dx is None else dx[rows]
        if masks is None:
            _lora_backward(part, x[rows], u, dz[rows], part_dx)
            continue
        part_dz = dy[rows] if part.gain is None else torch.addcmul(dy[rows], dy[rows], part.gain)
        _dropped_backward(part, x[rows], u, part_dz, part_dx, masks)
        if part.gain is not None and part_dx is not None:
            _dropped_base_backward(base, part, dy[rows] * part.gain, part_dx, masks)
    return dx


def _through_gain(work: Sequence[tuple[slice, LoraGroup, _Kept]], dy: Tensor) -> Tensor:
    """dy m / n for the segments with DoRA; those with dropout besides are done by themselves."""
    if not any(part.gain is not None and kept[2] is None for _, part, kept in work):
        return dy
    dz = dy.clone()
    for rows, part, (_, _, masks) in work:
        if part.gain is not None and masks is None:
            dz[rows].addcmul_(dy[rows], part.gain)
    return dz


def _magnitude_backward(part: LoraGroup, v: Tensor, dy: Tensor) -> None:
    """dm = sum over tokens of dy v / n."""
    assert part.inverse is not None
    along = (dy * v).sum(0, dtype=part.inverse.dtype).mul_(part.inverse)
    for module in part.modules:
        if module.grad_m is not None:
            module.grad_m.add_(along[module.out_start : module.out_stop])


def _du(part: LoraGroup, u: Tensor, dy: Tensor) -> Tensor:
    """du = s dy B, and s dy^T u to B's gradient (`b` holds s B)."""
    du = torch.empty_like(u)
    for module in part.modules:
        g = dy[:, module.out_start : module.out_stop]
        torch.mm(g, module.b, out=du[:, module.r_start : module.r_stop])
        if module.grad_b is not None:
            module.grad_b.add_(g.t() @ u[:, module.r_start : module.r_stop], alpha=module.scale)
    return du


def _lora_backward(part: LoraGroup, x: Tensor, u: Tensor, dy: Tensor, dx: Tensor | None) -> None:
    """Adds to the gradients of A and B in place, and LoRA's share to dx.

    With y += s u B^T and u = x A^T:  dB = s dy^T u,  du = s dy B,  dA = du^T x,  dx += du A.
    """
    du = _du(part, u, dy)
    if part.grad_a is not None:
        part.grad_a.add_(du.t() @ x)
    if dx is not None:
        dx.addmm_(du, part.a)


def _dropped_backward(  # noqa: PLR0917 - as _lora_backward
    part: LoraGroup, x: Tensor, u: Tensor, dy: Tensor, dx: Tensor | None, masks: Tensor
) -> None:
    """The same with u = (x mask / (1 - p)) A^T, a mask for each module."""
    du = _du(part, u, dy).mul_(part.dropout_scale)
    for mask, module in zip(masks, part.modules, strict=True):
        columns = slice(module.r_start, module.r_stop)
        if part.grad_a is not None:
            part.grad_a[columns].add_(du[:, columns].t() @ (x * mask))
        if dx is not None:
            dx.addcmul_(du[:, columns] @ part.a[columns], mask.to(dx.dtype))


def _dropped_base_backward(base: Frozen, part: LoraGroup, dy: Tensor, dx: Tensor, masks: Tensor) -> None:
    for mask, module in zip(masks, part.modules, strict=True):
        own = torch.zeros_like(dy)
        own[:, module.out_start : module.out_stop] = dy[:, module.out_start : module.out_stop]
        dx.addcmul_(base.backward(own).mul_(part.dropout_scale), mask.to(dx.dtype))


# Embeddings


def _embed_forward(
    tokens: Tensor, table: Tensor, lora: LoraPass, *, keep: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    y = F.embedding(tokens, table)
    kept: list[tuple[Tensor, Tensor | None]] = []
    for segment, part in _parts(lora, EMBEDDING):
        rows = slice(segment.start, segment.stop)
        own = y[rows]
        u = part.a.index_select(0, tokens[rows])
        _add_modules(own, u, part)
        v = own.clone() if keep and part.gain is not None else None
        if part.gain is not None:
            own.addcmul_(own if v is None else v, part.gain)
        kept.append((u, v))
    return y, kept


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any, tokens: Tensor, anchor: Tensor, table: Tensor, gradient: Tensor | None, lora: LoraPass
    ) -> Tensor:
        y, kept = _embed_forward(tokens, table, lora, keep=True)
        ctx.save_for_backward(tokens, *(tensor for one in kept for tensor in one))
        ctx.lora, ctx.gradient = lora, gradient
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *flat = ctx.saved_tensors
        if ctx.gradient is not None:
            ctx.gradient.index_add_(0, tokens, dy.to(ctx.gradient.dtype))
        for i, (segment, part) in enumerate(_parts(ctx.lora, EMBEDDING)):
            rows = slice(segment.start, segment.stop)
            u, v, g = flat[2 * i], flat[2 * i + 1], dy[rows]
            if part.gain is not None and v is not None:
                _magnitude_backward(part, v, g)
                g = torch.addcmul(g, g, part.gain)
            du = _du(part, u, g)
            if part.grad_a is not None:
                part.grad_a.index_add_(0, tokens[rows], du.to(part.grad_a.dtype))
        return None, None, None, None, None
