"""Log-probabilities at chosen positions and the gradients of their weighted sums, a block of rows at a time.

Only trained positions go through the head, and no more than a block of logits exists at once. The arithmetic is in
fp32, in fp64 on a base in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.engine.lora import Head

# Rows of logits at once: 64 x 49,152 in fp32 are 12 MB, which stays in the cache of one core complex.
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Of n positions: losses [n] = -log p of the target; correct [n]: no other token beats it."""

    losses: Tensor
    correct: Tensor

    def __getitem__(self, places: slice) -> TokenLosses:
        return TokenLosses(self.losses[places], self.correct[places])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums are computed in beside weights of this type."""
    return torch.promote_types(dtype, torch.float32)


def token_losses(hidden: Tensor, targets: Tensor, head: Head, first: int = 0) -> TokenLosses:
    """-log p of targets [n] given hidden rows [n, hidden]. first: their place among the rows that `head` is for."""
    n, dtype = hidden.shape[0], wide(hidden.dtype)
    made = _empty(n, dtype, hidden.device)
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        _measure(made, rows, head.forward(hidden[rows], first + start).to(dtype), targets[rows, None])
    return made


def token_losses_and_gradient(
    hidden: Tensor, targets: Tensor, head: Head, scales: Tensor
) -> tuple[TokenLosses, Tensor]:
    """The losses of hidden rows [n, hidden] and the gradient [n, hidden] of sum(scales * losses) with respect to them.

    scales [n]: 1 / trained tokens of the whole batch makes the gradients those of the batch's mean. The gradient is
    made in the same sweep, while the logits are at hand, and so are those of the head's LoRA.
    """
    n, dtype = hidden.shape[0], wide(hidden.dtype)
    gradient = torch.empty_like(hidden)
    made = _empty(n, dtype, hidden.device)
    for start in range(0, n, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, n))
        raw, kept = head.forward_kept(hidden[rows], start)
        logits, wanted, scale = raw.to(dtype), targets[rows, None], scales[rows, None]
        total = _measure(made, rows, logits, wanted)
        logits.mul_(scale / total)
        logits.scatter_add_(1, wanted, -scale)
        gradient[rows] = head.backward(hidden[rows], start, kept, logits.to(hidden.dtype))
    return made, gradient


def token_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> list[float]:
    """log p of each target given its hidden row, natural logarithm."""
    return [-loss for loss in token_losses(hidden, targets, head).losses.tolist()]


def _empty(n: int, dtype: torch.dtype, device: torch.device) -> TokenLosses:
    return TokenLosses(
        torch.empty(n, dtype=dtype, device=device), torch.empty(n, dtype=torch.bool, device=device)
    )


def _measure(made: TokenLosses, rows: slice, logits: Tensor, wanted: Tensor) -> Tensor:
    """Fills in these rows; leaves exp(logits - top) in `logits` and answers its sums [rows, 1]."""
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, wanted)
    made.correct[rows] = (chosen >= top).squeeze(1)
    logits.sub_(top).exp_()
    total = logits.sum(-1, keepdim=True)
    made.losses[rows] = (total.log() + top - chosen).squeeze(1)
    return total
