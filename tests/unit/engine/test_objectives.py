"""The preference losses on numbers worked out by hand, and that a batch's slices add up to the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lathe.engine.batch import RowLoss, RowObjective
from lathe.engine.model import Dpo, Kto, Orpo
from lathe.engine.recipes.dpo import DpoObjective
from lathe.engine.recipes.kto import KtoObjective
from lathe.engine.recipes.orpo import OrpoObjective, log1mexp

# log p of four rows, two pairs; how many tokens they have; log p under the reference.
SUMS, COUNTS, REFERENCE = (-4.0, -6.0, -9.0, -3.0), (2, 3, 3, 2), (-5.0, -5.0, -8.0, -4.0)
GOOD = (True, False, False, True)


def of(objective: RowObjective, start: int = 0, stop: int = 4) -> tuple[RowLoss, torch.Tensor]:
    """The loss of some of the rows, and its gradient to their log p."""
    sums = torch.tensor(SUMS[start:stop], dtype=torch.float64, requires_grad=True)
    result = objective(sums, torch.tensor(COUNTS[start:stop], dtype=torch.float64))
    result.loss.backward()
    assert sums.grad is not None
    return result, sums.grad


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo() -> None:
    loss, gradient = of(DpoObjective(Dpo(0.5), REFERENCE, 2))
    # Log-ratios 1, -1 and -1, 1: margins 2 and -2.
    assert loss.loss.item() == pytest.approx(-(math.log(sigmoid(1)) + math.log(sigmoid(-1))) / 2)
    weights = [0.5 * sigmoid(-1) / 2, 0.5 * sigmoid(1) / 2]
    assert gradient.tolist() == pytest.approx([-weights[0], weights[0], -weights[1], weights[1]])
    assert loss.figures == pytest.approx(
        {
            "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5,
            "logps/chosen": -6.5, "logps/rejected": -4.5,
        }
    )  # fmt: skip


def test_dpo_with_smoothed_labels_takes_some_preferences_to_be_wrong() -> None:
    loss, _ = of(DpoObjective(Dpo(0.5, label_smoothing=0.2), REFERENCE, 2))
    right, wrong = -math.log(sigmoid(1)), -math.log(sigmoid(-1))
    assert loss.loss.item() == pytest.approx((0.8 * right + 0.2 * wrong + 0.8 * wrong + 0.2 * right) / 2)


def test_ipo_regresses_the_margin_per_token() -> None:
    loss, _ = of(DpoObjective(Dpo(0.5, "ipo"), REFERENCE, 2))
    margins = [1 / 2 + 1 / 3, -1 / 3 - 1 / 2]
    assert loss.loss.item() == pytest.approx(sum((margin - 1) ** 2 for margin in margins) / 2)


def test_orpo() -> None:
    loss, _ = of(OrpoObjective(Orpo(0.25), 2, chosen_tokens=5))
    odds = [math.exp(s / n) / (1 - math.exp(s / n)) for s, n in zip(SUMS, COUNTS, strict=True)]
    ratios = [math.log(odds[0] / odds[1]), math.log(odds[2] / odds[3])]
    wanted = 13 / 5 - 0.25 * sum(math.log(sigmoid(ratio)) for ratio in ratios) / 2
    assert loss.loss.item() == pytest.approx(wanted)
    assert loss.figures["nll_loss"] == pytest.approx(13 / 5)
    assert loss.figures["log_odds_chosen"] == pytest.approx(sum(ratios) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_and_its_gradient_are_finite_and_right(dtype: torch.dtype) -> None:
    points = [0.0, -1e-30, -1e-6, -0.5, -0.7, -5.0, -80.0]
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()
    exact = [math.log(-math.expm1(point)) for point in points[2:-1]]
    assert value[2:-1].tolist() == pytest.approx(exact, rel=1e-4 if dtype is torch.float32 else 1e-9)


def test_kto() -> None:
    objective = KtoObjective(Kto(0.5, 2.0, 3.0), GOOD, REFERENCE, kl=0.5, good=2, bad=2)
    loss, gradient = of(objective)
    # Log-ratios 1, -1, -1, 1: what is good is 0.5 above z0 and what is bad 1.5 below it.
    assert loss.loss.item() == pytest.approx((2 * 2 * (1 - sigmoid(0.25)) + 2 * 3 * (1 - sigmoid(0.75))) / 4)
    assert [value < 0 for value in gradient.tolist()] == list(GOOD)
    assert loss.figures == pytest.approx(
        {
            "kl": 0.5, "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0,
            "logps/chosen": -3.5, "logps/rejected": -7.5,
        }
    )  # fmt: skip


def test_kto_of_a_batch_of_one_kind_names_only_its_figures() -> None:
    loss, _ = of(KtoObjective(Kto(), (True,) * 4, REFERENCE, kl=0.0, good=4, bad=0))
    assert set(loss.figures) == {"kl", "rewards/chosen", "logps/chosen"}


def dpo(start: int, stop: int) -> RowObjective:
    return DpoObjective(Dpo(0.3, label_smoothing=0.1), REFERENCE[start:stop], 2)


def ipo(start: int, stop: int) -> RowObjective:
    return DpoObjective(Dpo(0.3, "ipo"), REFERENCE[start:stop], 2)


def orpo(start: int, stop: int) -> RowObjective:
    return OrpoObjective(Orpo(), 2, 5)


def kto(start: int, stop: int) -> RowObjective:
    return KtoObjective(Kto(), GOOD[start:stop], REFERENCE[start:stop], kl=0.2, good=2, bad=2)


@pytest.mark.parametrize(("make", "unit"), [(dpo, 2), (ipo, 2), (orpo, 2), (kto, 1)])
@given(data=st.data())
def test_slices_of_a_batch_add_up_to_the_batch(
    make: Callable[[int, int], RowObjective], unit: int, data: st.DataObject
) -> None:
    whole, gradient = of(make(0, 4))
    cuts = data.draw(st.sets(st.integers(1, 4 // unit - 1), max_size=3)) if unit < 4 else set()
    parts = [
        of(make(a * unit, b * unit), a * unit, b * unit) for a, b in pairwise([0, *sorted(cuts), 4 // unit])
    ]
    assert sum(part.loss.item() for part, _ in parts) == pytest.approx(whole.loss.item())
    assert torch.cat([part for _, part in parts]).tolist() == pytest.approx(gradient.tolist())
    total: dict[str, float] = {}
    for part, _ in parts:
        total = add(total, part.figures)
    assert total == pytest.approx(dict(whole.figures))


def add(total: Mapping[str, float], figures: Mapping[str, float]) -> dict[str, float]:
    return {name: total.get(name, 0.0) + figures.get(name, 0.0) for name in {**total, **figures}}
