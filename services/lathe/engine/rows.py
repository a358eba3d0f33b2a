"""Training rows from the Arrow objects of the datasets service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lathe.engine.batch import TrainRow
from lathe.text.arrow import read_tokens


def read_rows(path: Path) -> list[TrainRow]:
    """Each row's tokens, loss mask, role and line. Raises DataLoss for a file that is no token object."""
    table = read_tokens(path)
    # Arrays are sequences in all that the engine does with them; numpy's types do not say so. They are copied because
    # the file's are read-only, which torch warns of.
    return [
        TrainRow(cast(Sequence[int], tokens.copy()), cast(Sequence[bool], mask.copy()), role, line)
        for tokens, mask, role, line in zip(table.tokens, table.mask, table.roles, table.lines, strict=True)
    ]
