"""What torch leaves untyped, typed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any) -> Tensor:
    """An answer of torch.ops or of an untyped function."""
    assert isinstance(value, Tensor)
    return value


def applied(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """function.apply."""
    return as_tensor(function.apply(*arguments))  # type: ignore[no-untyped-call]
