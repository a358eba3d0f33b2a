"""Which part of the weights is used next: what a decoder says for a base that is whole nowhere.

A sharded base (distributed/sharded.py) brings a part together just before it is used, and lets it go after. An ordinary
base has all of its parts at any time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from lathe.engine.lora_layout import GroupKey

# A layer by its number; the embeddings and the head by their GroupKeys.
Part = int | GroupKey


def part_of(key: GroupKey) -> Part:
    """The part that a linear belongs to."""
    return key[0] if key[0] >= 0 else key


class Parts(Protocol):
    """The parts of one base."""

    def passing(self, *, training: bool) -> AbstractContextManager[None]:
        """Around a pass: it takes the embeddings, each layer, the head, and in training the layers again from the last
        one. What it does not come to take, since it has nothing to do there or fails, is taken at its end."""

    def take(self, part: Part) -> None:
        """From now on the part is used, and the one before it no more."""

    def again(self, part: Part, hidden: Tensor) -> Tensor:
        """What the layer made of its input; the backward pass takes the layer when it comes back here."""

    def reading(self, part: Part) -> AbstractContextManager[None]:
        """Around a look at the part's weights outside of a pass."""


class AlwaysThere:
    """Parts of a base that is whole."""

    def passing(self, *, training: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def take(self, part: Part) -> None:
        pass

    def again(self, part: Part, hidden: Tensor) -> Tensor:
        return hidden

    def reading(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext()


ALWAYS_THERE = AlwaysThere()
