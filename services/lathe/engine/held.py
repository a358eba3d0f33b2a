"""What the engine holds under a key: an adapter or a whole model, with what its training needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lathe.engine.adapters import Adapter
from lathe.engine.base import Decoder
from lathe.engine.full import FullModel, ServedModel
from lathe.engine.optim import AdamW


@dataclass(slots=True)
class Held:
    """What a key stands for. A whole model has a decoder of its own and no slot (-1) in the bank."""

    slot: int
    adapter: Adapter | FullModel | ServedModel
    decoder: Decoder
    optimizer: AdamW | None
    serial: int
    users: int = 0
    begun: bool = False  # the gradients hold some slices of a step


@contextmanager
def kept(adapters: Sequence[Held]) -> Iterator[None]:
    """Gives the adapters their gradients back when the block fails. A step not begun has none to keep."""
    gradients = [held.optimizer.gradients for held in adapters if held.optimizer is not None]
    before = [grads.clone() if held.begun else None for held, grads in zip(adapters, gradients, strict=True)]
    try:
        yield
    except BaseException:
        for grads, old in zip(gradients, before, strict=True):
            grads.zero_() if old is None else grads.copy_(old)
        raise
