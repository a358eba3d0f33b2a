"""A base that is sharded over the ranks: each keeps 1/N of every matrix, and they bring a layer together to use it.

torch's FSDP2 (fully_shard; Zhao et al. 2023, arXiv:2304.11277) does the sharding, the gathering and the freeing. When a
part is gathered is said by the decoder (parts.Parts), not by hooks of modules: a rank that has nothing to do in a pass,
or fails in it, must still give its shards to the others. So a pass gathers the same parts in the same order on every
rank, whatever comes of it there.

In memory beside the shards are the part in use and the next one, which is on its way meanwhile. Norms are whole on each
rank: they are less than a thousandth of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from lathe.engine.frozen import Frozen
from lathe.engine.lora_layout import EMBEDDING, HEAD
from lathe.engine.model import RankLost
from lathe.engine.parts import Part
from lathe.engine.passes import is_out_of_memory
from lathe.engine.untyped import applied
from lathe.engine.weights import join


class Shards(Protocol):
    """A part of the base, of which every rank has some. Each call happens on every rank, in the same order."""

    def begin(self) -> Callable[[], None]:
        """Starts bringing it together; what it answers waits until it is whole."""

    def free(self) -> None:
        """Lets go of what is not this rank's own."""


class ShardedLinear(nn.Module):
    """y = x W^T (+ bias) like FrozenLinear, for a W [out, in] that is there only while its part is gathered."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Of this rank's shard."""
        own = (part.to_local() if isinstance(part, DTensor) else part for part in self.parameters())
        return sum(tensor.nbytes for tensor in own)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]; `residual` [T, out] is added."""
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        return F.linear(x, self.weight)

    def dense(self) -> Tensor:
        """W [out, in]; this rank's part of it in a DTensor while it is not gathered."""
        return self.weight

    def prepare(self) -> None:
        """Nothing is kept for the backward pass."""

    def backward(self, dy: Tensor) -> Tensor:
        """dy [T, out] -> dx [T, in]."""
        return dy @ self.weight


class FsdpShards:
    """Some linears as one FSDP2 group. Sharded when it is made: what was whole before is freed."""

    def __init__(self, linears: Sequence[ShardedLinear], mesh: DeviceMesh) -> None:
        self._group: FSDPModule = fully_shard(_Group(linears), mesh=mesh)

    def begin(self) -> Callable[[], None]:
        # A tensor born in inference mode could never be gathered into by a training pass.
        with torch.inference_mode(False):
            handle = cast(UnshardHandle, self._group.unshard(async_op=True))

        def wait() -> None:
            with torch.inference_mode(False):
                handle.wait()

        return wait

    def free(self) -> None:
        with torch.inference_mode(False):
            self._group.reshard()


class _Group(nn.Module):
    def __init__(self, linears: Sequence[ShardedLinear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)


class ShardedParts:
    """parts.Parts of a sharded base: which of its shards are whole now, and which come next."""

    def __init__(self, shards: Mapping[Part, Shards]) -> None:
        """shards: by part; the embeddings and the head may be one and the same. May be filled later."""
        self._shards = shards
        self._plan: list[Part] = []
        self._at = 0  # how many parts of the plan have been taken
        self._whole: Shards | None = None
        self._coming: tuple[Shards, Callable[[], None]] | None = None

    def plan(self, *, training: bool) -> list[Part]:
        """What a pass takes, in order."""
        layers: list[Part] = [*range(len(self._shards) - 2)]
        return [EMBEDDING, *layers, HEAD, *(reversed(layers) if training else ())]

    @contextmanager
    def passing(self, *, training: bool) -> Iterator[None]:
        self._plan, self._at = self.plan(training=training), 0
        try:
            yield
        except RankLost:
            raise
        except BaseException:
            with suppress(RankLost):  # what the pass failed of is what is to be heard
                self._take_the_rest()
            raise
        else:
            self._take_the_rest()
        finally:
            self._plan, self._at = [], 0
            self._free()

    def take(self, part: Part) -> None:
        """Raises RankLost when another rank is gone."""
        if self._at and self._plan[self._at - 1] == part:
            return
        if self._at >= len(self._plan) or self._plan[self._at] != part:
            raise RuntimeError(f"part {part} of the base is not what the pass takes after {self._at} others")
        self._next()

    def again(self, part: Part, hidden: Tensor) -> Tensor:
        return applied(_Again, hidden, self, part) if hidden.requires_grad else hidden

    @contextmanager
    def reading(self, part: Part) -> Iterator[None]:
        """Every rank reads the same parts in the same order, one at a time. Raises RankLost."""
        shards = self._shards[part]
        self._wait(shards, self._begin(shards))
        try:
            yield
        finally:
            self._free()

    def _take_the_rest(self) -> None:
        while self._at < len(self._plan):
            self._next()

    def _next(self) -> None:
        shards = self._shards[self._plan[self._at]]
        if shards is not self._whole:
            if self._whole is not None:
                self._whole.free()
                self._whole = None
            coming, self._coming = self._coming, None
            self._wait(shards, self._begin(shards) if coming is None else coming[1])
        self._at += 1
        if self._at < len(self._plan):
            following = self._shards[self._plan[self._at]]
            if following is not self._whole:
                self._coming = following, self._begin(following)

    def _begin(self, shards: Shards) -> Callable[[], None]:
        with _lost_if_broken():
            return shards.begin()

    def _wait(self, shards: Shards, wait: Callable[[], None]) -> None:
        with _lost_if_broken():
            wait()
        self._whole = shards

    def _free(self) -> None:
        for shards in (self._whole, None if self._coming is None else self._coming[0]):
            if shards is not None:
                shards.free()
        self._whole = self._coming = None


class Sharded:
    """weights.Placement: over the ranks, each part as soon as it is read, so that none of them ever holds the whole."""

    def __init__(self, shard: Callable[[Sequence[ShardedLinear]], Shards]) -> None:
        """shard: makes one part of some linears, of which every rank has the same, still whole (FsdpShards)."""
        self._shard = shard
        self._shards: dict[Part, Shards] = {}
        self.parts = ShardedParts(self._shards)

    def linear(self, weights: Sequence[Tensor], bias: Tensor | None) -> Frozen:
        return ShardedLinear(join(weights), bias)

    def ends(self, table: Tensor, head: Tensor | None, bias: Tensor | None) -> tuple[Frozen, Frozen]:
        lookup = ShardedLinear(table, None)
        output = (
            lookup if head is None and bias is None else ShardedLinear(table if head is None else head, bias)
        )
        self._shards[EMBEDDING] = self._shard([lookup])
        self._shards[HEAD] = self._shards[EMBEDDING] if output is lookup else self._shard([output])
        return lookup, output

    def complete(self, layer: int, linears: Sequence[Frozen]) -> None:
        self._shards[layer] = self._shard(cast(Sequence[ShardedLinear], linears))


@contextmanager
def _lost_if_broken() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RankLost(f"the base's shards could not be gathered: {error}") from error


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, parts: ShardedParts, part: Part) -> Tensor:
        ctx.parts, ctx.part = parts, part
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.parts.take(ctx.part)
        return gradient, None, None
