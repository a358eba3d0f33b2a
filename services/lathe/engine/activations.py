"""The activations of the decoders' MLPs, saving no more than their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.untyped import applied


@dataclass(frozen=True, slots=True)
class _Curve:
    """A pointwise function, and its gradient: (dy, x, dx) writes dx."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor], None]


def _silu_gradient(dy: Tensor, x: Tensor, dx: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=dx)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_gradient(dy: Tensor, x: Tensor, dx: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh", grad_input=dx)


_SILU = _Curve(F.silu, _silu_gradient)
_GELU_TANH = _Curve(_gelu, _gelu_gradient)
# By transformers' names; gelu_new and gelu_pytorch_tanh are one function (Hendrycks & Gimpel 2016, section 2).
_CURVES: Mapping[str, _Curve] = {
    "silu": _SILU,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
}


def activate(x: Tensor, name: str, *, gated: bool) -> Tensor:
    """The MLP's inner step. gated: x is gate beside up, [T, 2 I] -> f(gate) * up [T, I] (Shazeer 2020); else f(x)."""
    if x.requires_grad:
        return applied(_Gated if gated else _Plain, x, _CURVES[name])
    return _gated(x, _CURVES[name]) if gated else _CURVES[name].value(x)


def _gated(x: Tensor, curve: _Curve) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return curve.value(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: _Curve) -> Tensor:
        ctx.save_for_backward(x)
        ctx.curve = curve
        return _gated(x, curve)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(ctx.curve.value(gate), dy, out=d_up)
        ctx.curve.gradient(dy * up, gate, d_gate)
        return out, None


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: _Curve) -> Tensor:
        ctx.save_for_backward(x)
        ctx.curve = curve
        return curve.value(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        ctx.curve.gradient(dy, x, dx)
        return dx, None
