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


class FrozenLinear:
    """y = x W^T (+ bias) for a frozen W [out, in], with dx = dy W on demand.

    On a CPU in bfloat16 W is kept in oneDNN's blocked layout only: measured 2.2 times as fast as a plain W at
    1–16 rows (which is reordered at every call) and 6 % at 800. The layout for dx is made at the first backward
    pass, so a base that only serves is in memory once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _can_pack()
        self._weight = _pack(weight) if self._packed else weight.contiguous()
        self._bias = bias
        self._backward: Tensor | None = None

    @property
    def nbytes(self) -> int:
        copies = 2 if self._packed and self._backward is not None else 1
        bias = self._bias.nbytes if self._bias is not None else 0
        return (
            copies
            * self.out_features
            * self.in_features
            * (2 if self._packed else self._weight.element_size())
            + bias
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]; `residual` [T, out] is added within the same kernel where there is one."""
        if self._packed:
            ops = torch.ops.mkldnn._linear_pointwise
            if residual is not None:
                return _tensor(ops.binary(x, residual, self._weight, self._bias, "add"))
            return _tensor(ops(x, self._weight, self._bias, "none", [], ""))
        y = F.linear(x, self._weight, self._bias)
        return y if residual is None else y.add_(residual)

    def backward(self, dy: Tensor) -> Tensor:
        """dy [T, out] -> dx [T, in]."""
        if not self._packed:
            return dy @ self._weight
        if self._backward is None:
            self._backward = _pack(self._weight.to_dense().t().contiguous())
        return _tensor(torch.ops.mkldnn._linear_pointwise(dy, self._backward, None, "none", [], ""))


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)  # torch.ops is untyped
    return value


def applied(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """function.apply, which torch leaves untyped."""
    return _tensor(function.apply(*arguments))  # type: ignore[no-untyped-call]


def _can_pack() -> bool:
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(weight: Tensor) -> Tensor:
    return _tensor(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))


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
        part = lora.mixed.groups.get(group)
        if part is not None:
            u = F.linear(x, part.a)
            if part.mask is not None:
                u.mul_(part.mask)
            _add_modules(y, u, part)
        return y, []
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean of squares in fp32 (Zhang & Sennrich 2019)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return applied(_RmsNorm, x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square().div_(n).add_(ctx.eps))
        g = dy * weight
        dot = (g * x).sum(-1, keepdim=True, dtype=torch.float32)
        along = inverse.pow(3).mul_(dot).div_(n)
        # The row factors are rounded to the compute dtype: a mixed-type product costs eight times as much here.
        return g.mul_(inverse.to(x.dtype)).addcmul_(x, along.to(x.dtype), value=-1), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2 I] (gate beside up) -> silu(gate) * up [T, I]."""
    if gate_up.requires_grad:
        return applied(_SwiGlu, gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return (out,)
