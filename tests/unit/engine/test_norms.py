"""Norms whose weight is trained."""

from __future__ import annotations

import torch

from lathe.engine.trained import TrainedNorm


def test_a_trained_norm_goes_by_its_weight_as_it_is_now() -> None:
    weight = torch.ones(8)
    norm = TrainedNorm(weight, None, 1e-6, torch.zeros(8), None)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = norm.normalise(x)
    weight.mul_(2)
    assert torch.equal(norm.normalise(x), 2 * before)
    assert torch.equal(norm(x), norm.normalise(x))
