"""A linear whose weight never changes: what it can do, and the dense one (quantized.py has one in 4 bits)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.engine.untyped import as_tensor


class Frozen(Protocol):
    """y = x W^T (+ bias) for a frozen W [out, in]. nbytes: what stays in memory."""

    out_features: int
    in_features: int

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def nbytes(self) -> int: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]; `residual` [T, out] is added."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""

    def dense(self) -> Tensor:
        """W [out, in] in its plain layout and the compute dtype; a copy where it is kept otherwise."""

    def prepare(self) -> None:
        """Makes now what `backward` keeps, so that no pass takes memory for it."""

    def backward(self, dy: Tensor) -> Tensor:
        """dy [T, out] -> dx [T, in]."""


class FrozenLinear:
    """y = x W^T (+ bias) for a frozen W [out, in], with dx = dy W on demand.

    On a CPU in bfloat16 W is kept in oneDNN's blocked layout only: measured 2.2 times as fast as a plain W at
    1–16 rows (which is reordered at every call) and 6 % at 800. The layout for dx is made by `prepare`, or at the
    first backward pass, so a base that only serves is in memory once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, packed: bool = True) -> None:
        """packed: whether W may be kept in another layout than the given one."""
        self.out_features, self.in_features = weight.shape
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self._packed = packed and on_cpu and can_pack()
        self._weight = _pack(weight) if self._packed else weight.contiguous()
        self._bias = bias
        self._backward: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        return self._bias

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
                return as_tensor(ops.binary(x, residual, self._weight, self._bias, "add"))
            return as_tensor(ops(x, self._weight, self._bias, "none", [], ""))
        y = F.linear(x, self._weight, self._bias)
        return y if residual is None else y.add_(residual)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        if self._packed:
            return as_tensor(torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], ""))
        return F.linear(x, self._weight)

    def dense(self) -> Tensor:
        """W [out, in] in its plain layout; a copy where it is kept otherwise."""
        return self._weight.to_dense() if self._packed else self._weight

    def prepare(self) -> None:
        """Makes the layout for dx, where there is another one."""
        if self._packed and self._backward is None:
            self._backward = _pack(self.dense().t().contiguous())

    def backward(self, dy: Tensor) -> Tensor:
        """dy [T, out] -> dx [T, in]."""
        if not self._packed:
            return dy @ self._weight
        self.prepare()
        return as_tensor(torch.ops.mkldnn._linear_pointwise(dy, self._backward, None, "none", [], ""))


def can_pack() -> bool:
    """Whether this CPU has the layouts of oneDNN that a bfloat16 W is kept in."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _pack(weight: Tensor) -> Tensor:
    return as_tensor(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None))
