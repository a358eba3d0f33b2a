"""The normalisations of the decoders, for a frozen base: no gradient of a weight, nothing saved but the input."""

from __future__ import annotations

from dataclasses import dataclass
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

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean of squares in fp32 (Zhang & Sennrich 2019)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return applied(_RmsNorm, x, weight, eps)
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, dtype = x.shape[-1], x.dtype
        x = x.to(weight.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(norm.square().div_(n).add_(ctx.eps))
        g = dy * weight
        dot = (g * x).sum(-1, keepdim=True, dtype=wide)
        along = inverse.pow(3).mul_(dot).div_(n)
        # The row factors are rounded to the compute dtype: a mixed-type product costs eight times as much here.
        return g.mul_(inverse.to(x.dtype)).addcmul_(x, along.to(x.dtype), value=-1).to(dtype), None, None
