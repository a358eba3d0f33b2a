"""One pass over the whole rows of several slices: their losses, and their gradients.

Rows are laid end to end without padding (attention alone pads them, see attention.RowAttention), those of one adapter
side by side, so that LoRA's products are grouped by adapter. What a row gives depends on its own adapter, tokens and
objective alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.bank import AdapterBank, row_identity
from lathe.engine.base import Decoder
from lathe.engine.batch import CrossEntropy, RowLoss, SliceResult, TrainRow, TrainSlice
from lathe.engine.lora import Head
from lathe.engine.losses import TokenLosses, token_losses, token_losses_and_gradient, wide


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows laid end to end.

    tokens: [T]. places [n]: where the n trained positions are (each predicts the token after it); targets [n]: those
    tokens. counts: trained positions of each row, in order; names: what dropout knows the rows by.
    """

    tokens: Tensor
    lengths: list[int]
    places: Tensor
    targets: Tensor
    counts: list[int]
    names: list[int]


def pack(rows: Sequence[TrainRow]) -> Packed:
    """The rows' tensors, on the CPU."""
    lengths = [len(row.tokens) for row in rows]
    tokens = torch.cat([torch.as_tensor(row.tokens, dtype=torch.int64) for row in rows])
    targeted = torch.cat([_targets_of(row) for row in rows])
    ends = torch.tensor(lengths).cumsum(0)
    before = torch.cat([torch.zeros(1, dtype=torch.int64), targeted.cumsum(0)])
    counts = (before[ends] - before[ends - torch.tensor(lengths)]).tolist()
    chosen = targeted.nonzero().flatten()
    names = [row_identity(row.tokens) for row in rows]
    return Packed(tokens, lengths, chosen - 1, tokens[chosen], counts, names)


def check_rows(rows: Sequence[TrainRow], context_length: int, vocab_size: int) -> None:
    """Raises InvalidArgument naming the row that cannot go through a pass."""
    for i, row in enumerate(rows):
        where = f"row {i} of the slice (line {row.line})" if row.line else f"row {i} of the slice"
        if len(row.tokens) != len(row.mask) or not len(row.tokens):
            raise InvalidArgument(f"{where} is empty or its mask has another length.")
        if len(row.tokens) > context_length:
            raise InvalidArgument(f"{where} is longer than the context of {context_length}.")
        if min(row.tokens) < 0 or max(row.tokens) >= vocab_size:
            raise InvalidArgument(f"{where} has a token outside the vocabulary of {vocab_size}.")


def rows_pass(
    decoder: Decoder, bank: AdapterBank, packed: Packed, slots: Sequence[int], *, training: bool
) -> Tensor:
    """Hidden states [T, hidden] of the rows; slots: each row's adapter, -1 for the base."""
    positions = torch.cat([torch.arange(n) for n in packed.lengths]).to(decoder.device)
    tokens = packed.tokens.to(decoder.device)
    names = packed.names if training else None
    return decoder.forward(tokens, positions, packed.lengths, slots, bank, training=training, rows=names)


def run_slices(
    decoder: Decoder, bank: AdapterBank, pieces: Sequence[TrainSlice], slots: Sequence[int], *, training: bool
) -> list[SliceResult]:
    """The pieces' results, in their order; slots: each piece's adapter. training: adds to the adapters' gradients."""
    order = sorted(range(len(pieces)), key=slots.__getitem__)
    packed = pack([row for i in order for row in pieces[i].rows])
    spans = _spans([pieces[i] for i in order], packed.counts)
    if not packed.places.numel():
        nothing = TokenLosses(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        return [_result(piece, [0] * len(piece.rows), nothing) for piece in pieces]
    owners = [slots[i] for i in order for _ in pieces[i].rows]
    with torch.set_grad_enabled(training):
        hidden = rows_pass(decoder, bank, packed, owners, training=training)
        picked = hidden.index_select(0, packed.places.to(decoder.device))
    targets = packed.targets.to(decoder.device)
    head = decoder.head(bank.plan_head(owners, packed.counts, packed.names if training else None))
    with torch.no_grad():
        if training:
            scales = torch.cat([_scales(span, picked, targets, head) for span in spans])
            scales = scales.to(decoder.device, wide(decoder.dtype))
            losses, gradient = token_losses_and_gradient(picked, targets, head, scales)
        else:
            losses = token_losses(picked, targets, head)
    if training:
        picked.backward(gradient)  # type: ignore[no-untyped-call]
    results = {
        i: _result(span.piece, span.counts, losses[span.places]) for i, span in zip(order, spans, strict=True)
    }
    return [results[i] for i in range(len(pieces))]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no room; torch reports the CPU's as a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass(frozen=True, slots=True)
class _Span:
    """A slice within a pass: which of the trained positions are its own, and how many each of its rows has."""

    piece: TrainSlice
    places: slice
    counts: list[int]


def _spans(pieces: Sequence[TrainSlice], counts: list[int]) -> list[_Span]:
    spans: list[_Span] = []
    row = place = 0
    for piece in pieces:
        own = counts[row : row + len(piece.rows)]
        spans.append(_Span(piece, slice(place, place + sum(own)), own))
        row, place = row + len(own), place + sum(own)
    return spans


def _scales(span: _Span, picked: Tensor, targets: Tensor, head: Head) -> Tensor:
    """d loss / d (-log p) of each of the slice's positions [n], float64 on the CPU.

    A row objective is a function of its rows' sums, so every position of a row has the same: the sums are taken
    first, and the sweep that makes the gradient is the one of cross entropy.
    """
    objective, n = span.piece.objective, sum(span.counts)
    if isinstance(objective, CrossEntropy):
        return torch.full((n,), 1.0 / max(1, objective.batch_tokens), dtype=torch.float64)
    if not n:
        return torch.zeros(0, dtype=torch.float64)
    losses = token_losses(picked[span.places], targets[span.places], head, span.places.start)
    sums = _row_sums(losses, span.counts).requires_grad_()
    counts = torch.tensor(span.counts, dtype=torch.float64)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(objective(sums, counts).loss, sums)
    return -gradient.repeat_interleave(torch.tensor(span.counts))


def _row_sums(losses: TokenLosses, counts: list[int]) -> Tensor:
    """The sum of log p of each row [rows], float64 on the CPU."""
    parts = torch.split(losses.losses.to("cpu", torch.float64), counts)
    return -torch.stack([part.sum() for part in parts])


def _result(piece: TrainSlice, counts: list[int], losses: TokenLosses) -> SliceResult:
    sums = _row_sums(losses, counts)
    loss_sum = -float(sums.sum())
    if isinstance(piece.objective, CrossEntropy):
        answer = RowLoss(torch.tensor(loss_sum / max(1, piece.objective.batch_tokens), dtype=torch.float64))
    else:
        answer = piece.objective(sums, torch.tensor(counts, dtype=torch.float64))
    return SliceResult(
        loss_sum=loss_sum,
        tokens=sum(counts),
        correct=int(losses.correct.sum()),
        input_tokens=piece.input_tokens,
        loss=float(answer.loss),
        figures=answer.figures,
        row_losses=tuple((-sums).tolist()),
    )


def _targets_of(row: TrainRow) -> Tensor:
    """Which of the row's tokens are targets [tokens]; the first cannot be one."""
    mask = torch.as_tensor(row.mask, dtype=torch.bool).clone()
    mask[0] = False
    return mask
