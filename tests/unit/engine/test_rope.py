from __future__ import annotations

import pytest
import torch

from lathe.engine.rope import Rope, RopeSpec, RopeTables, longrope_scale, yarn_scale

CPU = torch.device("cpu")
LONG = RopeSpec(1e4, 4, kind="longrope", original_context=8, short=(1.0, 2.0), long=(3.0, 7.0), scale=1.5)


def tables(rope: RopeSpec, positions: list[int], lengths: list[int], reach: list[int]) -> Rope:
    return RopeTables(rope, CPU, torch.float64).at(torch.tensor(positions), lengths, reach)


@pytest.mark.parametrize("size", [8, 6, 2])
def test_turning_back_is_the_inverse(size: int) -> None:
    x = torch.randn(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = tables(RopeSpec(100.0, size), [0, 1, 2, 7, 300], [5], [301])
    turned = rope.rotate(x)
    torch.testing.assert_close(rope.unrotate(turned), x, atol=1e-6, rtol=0)
    assert torch.equal(turned[0], x[0])
    assert torch.equal(turned[..., size:], x[..., size:])
    assert (turned[1:, :, :size] - x[1:, :, :size]).abs().max() > 0.1


def test_each_sequence_has_its_own_of_longropes_frequencies() -> None:
    """Which company a sequence has in a pass does not matter, nor how much of it the pass brings."""
    mixed = tables(LONG, [0, 1, 2, 4, 5], [3, 2], [8, 9])
    near, far = tables(LONG, [0, 1, 2], [3], [8]), tables(LONG, [4, 5], [2], [9])
    assert torch.equal(mixed.cos, torch.cat((near.cos, far.cos)))
    assert torch.equal(mixed.sin, torch.cat((near.sin, far.sin)))
    assert not torch.equal(tables(LONG, [4, 5], [2], [8]).cos, far.cos)
    assert float(near.cos[0, 0, 0]) == 1.5


def test_the_factors_of_the_rotated_features() -> None:
    assert yarn_scale(1.0) == longrope_scale(1.0, 4096) == 1.0
    assert yarn_scale(4.0) == pytest.approx(1.1386294)
    assert yarn_scale(40.0, 0.5, 0.5) == 1.0
    assert longrope_scale(32.0, 4096) == pytest.approx(1.1902381)
