"""A base in 4 bits (QLoRA, Dettmers et al. 2023): NF4 weights by bitsandbytes, made dense again for each product.

Equal to transformers' load_in_4bit with nf4, module by module: blocks of 64 weights share a scale, and the scales are
quantised once more (double quantisation). The head, the embeddings and the norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.common.errors import FailedPrecondition
from lathe.engine.untyped import as_tensor


class NF4Linear:
    """y = x W^T (+ bias) like FrozenLinear, W in 4 bits. Several parts make one W, each quantised by itself.

    A product needs W dense for a moment: `nbytes` counts what stays.
    """

    def __init__(self, parts: Sequence[Tensor], bias: Tensor | None) -> None:
        functional = bitsandbytes()
        self.out_features, self.in_features = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self._parts = [
            functional.quantize_4bit(part.contiguous(), quant_type="nf4", compress_statistics=True)
            for part in parts
        ]
        self._bias = bias

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    @property
    def nbytes(self) -> int:
        kept = sum(
            packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes for packed, state in self._parts
        )
        return int(kept) + (self._bias.nbytes if self._bias is not None else 0)

    def dense(self) -> Tensor:
        """W [out, in] in the compute dtype; a copy."""
        functional = bitsandbytes()
        parts = [as_tensor(functional.dequantize_4bit(packed, state)) for packed, state in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]; `residual` [T, out] is added."""
        y = F.linear(x, self.dense(), self._bias)
        return y if residual is None else y.add_(residual)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        return F.linear(x, self.dense())

    def prepare(self) -> None:
        """Nothing is kept for it."""

    def backward(self, dy: Tensor) -> Tensor:
        """dy [T, out] -> dx [T, in]."""
        return dy @ self.dense()


def bitsandbytes() -> Any:
    """bitsandbytes.functional. Raises FailedPrecondition when it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise FailedPrecondition(
            "base_quantization nf4 needs the extra `nf4`: pip install 'lathe[nf4]'"
        ) from error
    return functional
