"""LoRA of several adapters of one shape, in batched products.

Slices of several small jobs in one pass give each adapter few rows: a product then costs its call, not its arithmetic.
Adapters whose modules and ranks are the same are multiplied by one call, a batch entry each (4 adapters at 50 rows: 40
against 80 us for A x, 31 against 80 for B u). Gradients of B stay one by one: batched, they are slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lathe.engine.adapters import LoraGroup

# Padding to the longest segment may multiply rows by this; longer segments than these tokens fill a call by themselves.
_MOST_PADDING = 1.25
_LONGEST = 160


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Adjoining segments of a pass, (first row, past the last), as a batch [segments, length, …].

    pad [segments * length]: the row at each place; past a segment's end its last row again. inside [segments * length]:
    whether a place is a row. unpad [rows]: the place of each row. None: nothing is padded.
    """

    spans: tuple[tuple[int, int], ...]
    length: int
    pad: Tensor | None = None
    inside: Tensor | None = None
    unpad: Tensor | None = None

    def batch(self, x: Tensor) -> Tensor:
        """x [T, n] -> [segments, length, n]; a view where nothing is padded."""
        rows = self._own(x) if self.pad is None else x.index_select(0, self.pad)
        return rows.view(len(self.spans), self.length, -1)

    def batch_zeroed(self, x: Tensor) -> Tensor:
        """The same with zeros for padding, so that a product over the rows does not see it."""
        batch = self.batch(x)
        return batch if self.inside is None else batch.mul_(self.inside.to(x.dtype).view(*batch.shape[:2], 1))

    def add_product(self, y: Tensor, columns: slice, left: Tensor, right: Tensor) -> None:
        """y[:, columns] += left @ right of each segment, in place."""
        own = self._own(y)
        if self.unpad is None:
            own.view(len(self.spans), self.length, -1)[:, :, columns].baddbmm_(left, right)
        else:
            own[:, columns].add_(torch.bmm(left, right).flatten(0, 1).index_select(0, self.unpad))

    def _own(self, x: Tensor) -> Tensor:
        return x[self.spans[0][0] : self.spans[-1][1]]


@dataclass(frozen=True, slots=True)
class Batched:
    """The parts of one fused linear, an adapter each, and the rows that they apply to."""

    rows: BatchRows
    parts: tuple[LoraGroup, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What the backward pass needs: x [segments, length, in] (padding zeroed), u, and the stacked A and B."""

    x: Tensor
    u: Tensor
    a: Tensor
    b: list[Tensor]


def batched(rows: BatchRows | None, parts: Sequence[LoraGroup]) -> Batched | None:
    """The parts of one linear, of the pass's segments in order, as a batch; None where they go one by one."""
    if rows is None or len(parts) != len(rows.spans):
        return None
    alike = all(_shape(part) == _shape(parts[0]) for part in parts)
    plain = all(part.gain is None and part.grad_a is not None for part in parts)
    return Batched(rows, tuple(parts)) if alike and plain else None


def forward(x: Tensor, y: Tensor, batch: Batched) -> Kept:
    """Adds every adapter's s B A x to y [T, out]."""
    rows, parts = batch.rows, batch.parts
    own = rows.batch_zeroed(x)
    a = torch.stack([part.a for part in parts])
    u = torch.bmm(own, a.transpose(1, 2))
    stacked: list[Tensor] = []
    for i, module in enumerate(parts[0].modules):
        b = torch.stack([part.modules[i].b for part in parts])
        outputs, columns = slice(module.out_start, module.out_stop), slice(module.r_start, module.r_stop)
        rows.add_product(y, outputs, u[:, :, columns], b.transpose(1, 2))
        stacked.append(b)
    return Kept(own, u, a, stacked)


def backward(kept: Kept, batch: Batched, dy: Tensor, dx: Tensor | None) -> None:
    """Adds to the gradients of A and B, and LoRA's share to dx (see lora._lora_backward for the formulas)."""
    rows, parts = batch.rows, batch.parts
    own = rows.batch(dy)
    pieces: list[Tensor] = []
    for i, module in enumerate(parts[0].modules):
        outputs, columns = slice(module.out_start, module.out_stop), slice(module.r_start, module.r_stop)
        pieces.append(torch.bmm(own[:, :, outputs], kept.b[i]))
        for place, ((start, stop), part) in enumerate(zip(rows.spans, parts, strict=True)):
            mine = part.modules[i]
            assert mine.grad_b is not None
            u = kept.u[place, : stop - start, columns]
            mine.grad_b.add_(dy[start:stop, outputs].t() @ u, alpha=mine.scale)
    du = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
    # Places of padding have a zero x: what du holds there adds nothing.
    gradients = torch.bmm(du.transpose(1, 2), kept.x)
    for part, gradient in zip(parts, gradients, strict=True):
        assert part.grad_a is not None
        part.grad_a.add_(gradient)
    if dx is not None:
        rows.add_product(dx, slice(None), du, kept.a)


def _shape(part: LoraGroup) -> tuple[object, ...]:
    return (part.a.shape, *((one.out_start, one.out_stop, one.r_start, one.r_stop) for one in part.modules))


def batch_rows(spans: Sequence[tuple[int, int]], device: torch.device) -> BatchRows | None:
    """The segments' rows as a batch; None where that does not pay."""
    lengths = [stop - start for start, stop in spans]
    adjoin = all(one[1] == other[0] for one, other in pairwise(spans))
    if len(spans) < 2 or not adjoin:
        return None
    longest = max(lengths)
    if longest > _LONGEST or longest * len(spans) > _MOST_PADDING * sum(lengths):
        return None
    if min(lengths) == longest:
        return BatchRows(tuple(spans), longest)
    counts = torch.tensor(lengths, device=device)[:, None]
    starts = torch.tensor([start for start, _ in spans], device=device)[:, None]
    places = torch.arange(longest, device=device)[None]
    inside = (places < counts).flatten()
    pad = (starts + places.minimum(counts - 1)).flatten()
    return BatchRows(tuple(spans), longest, pad, inside, inside.nonzero().flatten())
