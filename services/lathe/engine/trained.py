"""The parts of a decoder whose own weights are trained (full.py): they add to gradients that others hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.frozen import FrozenLinear
from lathe.engine.norms import Norm
from lathe.engine.untyped import applied


class TrainedLinear(FrozenLinear):
    """A linear whose weight is trained: its own views of the compute copy and of the gradients."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grad_weight: Tensor, grad_bias: Tensor | None
    ) -> None:
        super().__init__(weight, bias, packed=False)
        self._grad_weight, self._grad_bias = grad_weight, grad_bias

    def learn(self, x: Tensor, dy: Tensor) -> None:
        """dW += dy^T x, db += dy summed over the tokens."""
        self._grad_weight.add_(dy.t() @ x)
        if self._grad_bias is not None:
            self._grad_bias.add_(dy.sum(0, dtype=self._grad_bias.dtype))


@dataclass(frozen=True, slots=True)
class TrainedNorm(Norm):
    """A norm whose weight (and bias) is trained."""

    grad_weight: Tensor
    grad_bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return applied(_TrainedNorm, x, self) if torch.is_grad_enabled() else self.plain(x)

    def __post_init__(self) -> None:
        """No gain made beforehand: the weight changes with each step."""

    def normalise(self, x: Tensor) -> Tensor:
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """By torch's own functions, which know every gradient."""
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


class _TrainedNorm(torch.autograd.Function):
    """Its backward pass is torch's own, in fp32 at least: norms are a small part of the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: TrainedNorm) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.plain(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), norm = ctx.saved_tensors, ctx.norm
        wide = norm.grad_weight.dtype
        own = [norm.weight] if norm.bias is None else [norm.weight, norm.bias]
        inputs = [part.detach().to(wide).requires_grad_() for part in (x, *own)]
        with torch.enable_grad():
            y = replace(norm, weight=inputs[1], bias=None if norm.bias is None else inputs[2]).plain(
                inputs[0]
            )
            gradients = torch.autograd.grad(y, inputs, dy.to(wide))
        norm.grad_weight.add_(gradients[1])
        if norm.grad_bias is not None:
            norm.grad_bias.add_(gradients[2])
        return gradients[0].to(x.dtype), None
