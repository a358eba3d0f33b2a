"""The normalisations of the decoders, for a frozen base: no gradient of a weight, nothing saved but the input."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.untyped import applied


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation over the last axis: RMSNorm, or LayerNorm where there is a bias.

    A weight in fp32 beside activations in bfloat16 makes the whole norm fp32 (Gemma's 1 + w does not fit bfloat16).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    # weight * sqrt(n) and eps * n, in fp32 at least: what `normalise` multiplies by and adds.
    _gain: Tensor = field(init=False, repr=False)
    _floor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n = self.weight.shape[-1]
        gain = self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32)) * math.sqrt(n)
        object.__setattr__(self, "_gain", gain)
        object.__setattr__(self, "_floor", gain.new_tensor(self.eps * n))

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if torch.is_grad_enabled() and x.requires_grad:
            return applied(_RmsNorm, x, self)
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight, the mean of squares in fp32 (Zhang & Sennrich 2019); no gradient.

        torch's own is one kernel on a GPU. On a CPU it is nine: measured 12.5 against 8.4 us at 8 rows of 576, 73
        against 55 at 256, with the same numbers but for a last bit in 100,000.
        """
        if x.device.type != "cpu":
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        wide = x.to(self._gain.dtype, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return wide.mul_(norm.square_().add_(self._floor).rsqrt_()).mul_(self._gain).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.normalise(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, eps = ctx.saved_tensors, ctx.norm.weight, ctx.norm.eps
        n, dtype = x.shape[-1], x.dtype
        x = x.to(weight.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(norm.square().div_(n).add_(eps))
        g = dy * weight
        dot = (g * x).sum(-1, keepdim=True, dtype=wide)
        along = inverse.pow(3).mul_(dot).div_(n)
        # The row factors are rounded to the compute dtype: a mixed-type product costs eight times as much here.
        return g.mul_(inverse.to(x.dtype)).addcmul_(x, along.to(x.dtype), value=-1).to(dtype), None
