from __future__ import annotations

import pytest
import torch

from lathe.engine.optim import AdamW


def test_the_update_is_torchs_adamw_with_clipping() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, gradients = torch.randn(50, generator=generator), torch.zeros(50)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.02)
    optimizer = AdamW(ours, gradients)
    for step in range(6):
        gradient = torch.randn(50, generator=generator) * (10 if step % 2 else 0.01)
        gradients.copy_(gradient)
        theirs.grad = gradient.clone()
        lr = 0.1 / (step + 1)
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert optimizer.step(lr, clip=1.0, weight_decay=0.02) == pytest.approx(float(norm))
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert not gradients.any()
