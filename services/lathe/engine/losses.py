"""Cross entropy and log-probabilities at chosen positions, in fp32, a block of rows at a time.

Only trained positions go through the head, and no more than a block of logits exists at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.engine.lora import Head
from lathe.engine.untyped import applied

# Rows of logits at once: 64 x 49,152 in fp32 are 12 MB, which stays in the cache of one core complex.
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Of the trained positions: `loss_sum` is the sum of -log p; `correct` counts targets no other token beats."""

    loss_sum: float
    tokens: int
    correct: int


def trained_positions(masks: Sequence[Sequence[bool]]) -> list[int]:
    """Flat positions whose next token is a target, over rows laid end to end.

    masks[r][i] says that token i of row r is a target; it is predicted at position i - 1, so masks[r][0] cannot be.
    """
    positions: list[int] = []
    start = 0
    for mask in masks:
        positions.extend(start + i - 1 for i in range(1, len(mask)) if mask[i])
        start += len(mask)
    return positions


def cross_entropy(hidden: Tensor, targets: Tensor, head: Head, scale: float) -> tuple[Tensor, TokenLoss]:
    """Loss of hidden rows [n, hidden] against targets [n].

    Answers a scalar to call backward() on, worth scale * loss_sum (scale = 1 / trained tokens of the whole batch
    makes the gradients those of the batch's mean), and the figures. With gradients enabled the gradient of the
    rows is made in the same sweep, while the logits are at hand, and so are those of the head's LoRA.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        box: list[TokenLoss] = []
        loss = applied(_CrossEntropy, hidden, targets, head, scale, box)
        return loss, box[0]
    figures, _ = _sweep(hidden, targets, head, None)
    return hidden.new_tensor(figures.loss_sum * scale, dtype=torch.float32), figures


def token_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> list[float]:
    """log p of each target given its hidden row, natural logarithm, fp32."""
    values: list[float] = []
    for start in range(0, hidden.shape[0], BLOCK_ROWS):
        logits = head.forward(hidden[start : start + BLOCK_ROWS], start).float()
        chosen = logits.gather(1, targets[start : start + BLOCK_ROWS, None]).squeeze(1)
        values.extend((chosen - torch.logsumexp(logits, -1)).tolist())
    return values


def _sweep(
    hidden: Tensor, targets: Tensor, head: Head, scale: float | None
) -> tuple[TokenLoss, Tensor | None]:
    n = hidden.shape[0]
    gradient = None if scale is None else torch.empty_like(hidden)
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        raw, kept = head.forward_kept(hidden[rows], start)
        logits = raw.float()
        wanted = targets[rows, None]
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, wanted)
        correct += (chosen >= top).sum()
        logits.sub_(top).exp_()
        total = logits.sum(-1, keepdim=True)
        losses[rows] = (total.log() + top - chosen).squeeze(1)
        if gradient is not None and scale is not None:
            logits.mul_(scale / total)
            logits.scatter_add_(1, wanted, torch.full_like(chosen, -scale))
            gradient[rows] = head.backward(hidden[rows], start, kept, logits.to(hidden.dtype))
    return TokenLoss(float(losses.sum(dtype=torch.float64)), n, int(correct)), gradient


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, scale: float, box: list[TokenLoss]
    ) -> Tensor:
        figures, gradient = _sweep(hidden, targets, head, scale)
        assert gradient is not None
        ctx.save_for_backward(gradient)
        box.append(figures)
        return hidden.new_tensor(figures.loss_sum * scale, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        factor = float(d_loss)
        return gradient if factor == 1.0 else gradient * factor, None, None, None, None
