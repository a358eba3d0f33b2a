"""What the losses over preference pairs share: how pairs lie in a slice, and the figures that show them learned.

A figure is the slice's share of the whole batch's mean, so the figures of a batch's slices add up to the batch's. Their
names are TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.recipes.recipe import TrainData
from lathe.text.formats import Role

PAIR = ((Role.CHOSEN,), (Role.REJECTED,))


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of a slice's row values [2 n]: those of the chosen rows and those of the rejected ones, [n] each."""
    return values[0::2], values[1::2]


def pair_figures(
    chosen_reward: Tensor, rejected_reward: Tensor, logps: Tensor, pairs: int
) -> dict[str, float]:
    """The figures of n of a batch's `pairs` pairs. Rewards: [n] each; logps: what a row's log p is, [2 n]."""
    chosen, rejected = split_pairs(logps)
    return shares(
        {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/margins": chosen_reward - rejected_reward,
            "rewards/accuracies": chosen_reward > rejected_reward,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        },
        pairs,
    )


def shares(values: Mapping[str, Tensor], of: int) -> dict[str, float]:
    """Each tensor's sum over `of`, the values of the whole batch; one transfer from the device."""
    sums = torch.stack([value.detach().sum(dtype=torch.float64) for value in values.values()]) / of
    return dict(zip(values, sums.tolist(), strict=True))


def check_roles(data: TrainData, roles: Sequence[tuple[Role, ...]]) -> None:
    """Whether the rows of both files are what a method takes: their roles, in turn, are one of `roles[0]`, one of
    `roles[1]`, … and from the start again. Raises InvalidArgument naming the first line that is not."""
    for name, rows in (("training", data.training), ("validation", data.validation)):
        for place, row in enumerate(rows):
            wanted = roles[place % len(roles)]
            if row.role not in wanted:
                raise InvalidArgument(
                    f"Line {row.line} of the {name} file is {row.role.name.lower()} to its method, where this method "
                    f"takes {' or '.join(role.name.lower() for role in wanted)}; use a file of this method's format.",
                    reason=f"INVALID_{name.upper()}_FILE",
                )
        if len(rows) % len(roles):
            raise InvalidArgument(
                f"The {name} file ends within a pair.", reason=f"INVALID_{name.upper()}_FILE"
            )
