from __future__ import annotations

import torch

from lathe.engine.bank import row_identity
from lathe.engine.dropout import keep_mask

CPU = torch.device("cpu")


def mask(
    rows: list[tuple[int, int]], *, p: float = 0.1, draw: tuple[int, int, str] = (1, 2, "m")
) -> torch.Tensor:
    return keep_mask(rows, 301, p=p, draw=draw, device=CPU)


def test_it_keeps_the_share_that_was_asked_for() -> None:
    for p in (0.0, 0.05, 0.1, 0.5, 0.9):
        kept = mask([(1000, 5)], p=p).double()
        assert abs(float(kept.mean()) - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-5
        # Neighbours along both axes are independent.
        for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
            assert abs(float((a * b).mean()) - (1 - p) ** 2) < 0.005


def test_it_depends_on_seed_step_module_and_row_alone() -> None:
    first = mask([(7, 5)])
    assert torch.equal(first, mask([(7, 5)]))
    for other in (
        mask([(7, 6)]),
        mask([(7, 5)], draw=(2, 2, "m")),
        mask([(7, 5)], draw=(1, 3, "m")),
        mask([(7, 5)], draw=(1, 2, "n")),
    ):
        assert not torch.equal(first, other)
    together = mask([(3, 9), (7, 5), (1, 4)])
    assert torch.equal(together[3:10], first)


def test_a_row_is_known_by_its_tokens() -> None:
    assert row_identity([1, 2, 3]) == row_identity((1, 2, 3))
    assert len({row_identity(row) for row in ([1, 2, 3], [1, 2], [3, 2, 1], [1, 2, 3, 0])}) == 4
