"""The differentiable pieces of the decoder, made for a frozen base with LoRA.

None of them keeps a gradient for a base weight, and none saves more than its input. Each is an
autograd.Function whose forward is also callable without the tape (sampling).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.adapters import LoraGroup, LoraPass
from lathe.engine.frozen import FrozenLinear, as_tensor


def applied(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """function.apply, which torch leaves untyped."""
    return as_tensor(function.apply(*arguments))  # type: ignore[no-untyped-call]


def linear(
    x: Tensor, base: FrozenLinear, lora: LoraPass, group: tuple[int, str], residual: Tensor | None = None
) -> Tensor:
    """The base linear plus each segment's LoRA: [T, in] -> [T, out].

    group: (layer, name of the fused linear). `lora.anchor` carries requires_grad into the first layer, whose x
    needs no gradient of its own.
    """
    if lora.anchor is not None:
        return applied(_Linear, x, residual, lora.anchor, base, lora, group)
    return _linear_forward(x, residual, base, lora, group)[0]


def _linear_forward(
    x: Tensor, residual: Tensor | None, base: FrozenLinear, lora: LoraPass, group: tuple[int, str]
) -> tuple[Tensor, list[Tensor]]:
    y = base.forward(x, residual)
    if lora.mixed is not None:
        both = lora.mixed.groups.get(group)
        if both is None:
            return y, []
        u = both.a.forward(x)
        mask = lora.mixed.masks[both.pattern]
        return both.b.forward(u if mask is None else u.mul_(mask), residual=y), []
    inner: list[Tensor] = []
    for segment in lora.segments:
        part = segment.adapter.groups.get(group)
        if part is None:
            continue
        u = F.linear(x[segment.start : segment.stop], part.a)
        _add_modules(y[segment.start : segment.stop], u, part)
        inner.append(u)
    return y, inner


def _add_modules(y: Tensor, u: Tensor, part: LoraGroup) -> None:
    # One small product a module: a block-diagonal B in one product was measured slower (185 against 129 us).
    for module in part.modules:
        y[:, module.out_start : module.out_stop].addmm_(u[:, module.r_start : module.r_stop], module.b.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        anchor: Tensor,
        base: FrozenLinear,
        lora: LoraPass,
        group: tuple[int, str],
    ) -> Tensor:
        y, inner = _linear_forward(x, residual, base, lora, group)
        ctx.save_for_backward(x, *inner)
        ctx.base, ctx.lora, ctx.group, ctx.has_residual = base, lora, group, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *inner = ctx.saved_tensors
        dy = dy.contiguous()
        dx = ctx.base.backward(dy) if ctx.needs_input_grad[0] else None
        saved = iter(inner)
        for segment in ctx.lora.segments:
            part = segment.adapter.groups.get(ctx.group)
            if part is None:
                continue
            rows = slice(segment.start, segment.stop)
            _lora_backward(part, x[rows], next(saved), dy[rows], None if dx is None else dx[rows])
        return dx, dy if ctx.has_residual else None, None, None, None, None


def _lora_backward(part: LoraGroup, x: Tensor, u: Tensor, dy: Tensor, dx: Tensor | None) -> None:
    """Adds to the fp32 gradients of A and B in place, and LoRA's share to dx.

    With y += s u B^T and u = x A^T:  dB = s dy^T u,  du = s dy B,  dA = du^T x,  dx += du A  (`b` holds s B).
    """
    du = torch.empty_like(u)
    for module in part.modules:
        g = dy[:, module.out_start : module.out_stop]
        torch.mm(g, module.b, out=du[:, module.r_start : module.r_stop])
        if module.grad_b is not None:
            module.grad_b.add_(g.t() @ u[:, module.r_start : module.r_stop], alpha=part.scale)
    if part.grad_a is not None:
        part.grad_a.add_(du.t() @ x)
    if dx is not None:
        dx.addmm_(du, part.a)
