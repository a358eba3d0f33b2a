from __future__ import annotations

import pytest
import torch

from lathe.common.errors import InvalidArgument
from lathe.engine.optim import AdamW, Schedule


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    parameters, gradients = torch.ones(3), torch.tensor([1.0, float("nan"), 0.0])
    optimizer = AdamW(parameters, gradients)
    assert optimizer.step(0.1, clip=1.0, weight_decay=0.0) != optimizer.steps
    assert parameters.tolist() == [1, 1, 1]
    assert (optimizer.steps, gradients.any().item()) == (0, False)


def test_the_state_of_another_adapter_is_refused() -> None:
    state = AdamW(torch.ones(3), torch.zeros(3)).state()
    with pytest.raises(InvalidArgument, match="does not fit"):
        AdamW(torch.ones(4), torch.zeros(4)).load_state(state)


def test_schedules() -> None:
    cosine = Schedule("cosine", 1.0, total_steps=12, warmup_steps=2)
    assert [round(cosine.lr(step), 4) for step in (0, 1, 2, 7, 12)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    linear = Schedule("linear", 2.0, total_steps=4)
    assert [linear.lr(step) for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert Schedule("constant", 0.3, total_steps=4).lr(100) == 0.3
